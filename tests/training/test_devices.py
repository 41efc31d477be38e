"""No schedule makes a tensor on the CPU when its model is elsewhere: forward and backward on the meta device, which mixes with
no other. What only a CUDA device can tell is `tests/parity/test_cuda_training.py`."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import tiny_config, tiny_model
from training.command import device_of
from training.config import OptimizerConfig
from training.optimizer import Optimizer
from training.schedules.registry import bind, entry

SCHEDULES = {
    "baseline": ("baseline", {}),
    "chunked": ("chunked", {"chunk_len": 7}),
    "interleaved": ("interleaved", {"num_subsets": 3}),
    "interleaved_refresh": ("interleaved", {"num_subsets": 2, "kv_refresh": True}),
    "multi_refine": ("multi_refine", {"loss_weights": (0.1, 0.3, 0.6)}),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_stays_on_its_device(name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than the window, so that masks are made."""
    schedule, options = SCHEDULES[name]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which knows no meta device
    overrides = {} if entry(schedule).is_recurrent else {"recurrence": None}
    model = tiny_model(tiny_config(sequence_len=16, **overrides)).to("meta")
    model.recompute = recompute
    tokens = torch.zeros(2, 24, dtype=torch.long, device="meta")
    losses = bind(schedule, options)(model, tokens, tokens)
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert losses.total.device.type == "meta"
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients and all(gradient.device.type == "meta" for gradient in gradients)


def test_a_mixture_would_be_seen() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device="meta") + torch.ones(3)


def test_optimizer_state_lies_where_the_weights_do() -> None:
    model = tiny_model().to("meta")
    assert {value.device.type for value in Optimizer(model, OptimizerConfig()).tensors().values()} == {"meta"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="--device cuda:3: no CUDA device can be used here"):
        device_of("cuda:3")
    assert device_of("cpu") == torch.device("cpu")
