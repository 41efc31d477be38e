"""A batch's gradients: parts without targets, what is let go of. `tests/parity/test_cuda_training.py` has the graphs."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.helpers import tiny_trainer
from training.schedules.baseline import baseline
from training.schedules.losses import IGNORE, Losses
from training.schedules.registry import entries


def without_shares(model: Any, tokens: Tensor, targets: Tensor) -> Losses:
    """A schedule that names none."""
    losses = baseline(model, tokens, targets)
    counts = (targets != IGNORE).sum()
    return Losses(losses.passes[0].token_losses.sum() / counts, losses.passes)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_part_without_a_target_gives_nothing(tmp_path: Path, accumulate: int) -> None:
    trainer = tiny_trainer(tmp_path, model={"recurrence": None}, batch_size=4, accumulate=accumulate)
    trainer.gradients.schedule = without_shares
    tokens, targets = trainer.packer.batch()
    targets[1:] = IGNORE
    loss, nats, num_bytes = trainer.gradients(tokens, targets)
    expected = baseline(trainer.model, tokens[:1], targets[:1])
    assert loss == pytest.approx(expected.total.item(), rel=1e-5)
    assert nats > 0 and num_bytes > 0
    found = [weight.grad.clone() for weight in trainer.model.parameters() if weight.grad is not None]
    trainer.gradients.release()
    assert all(weight.grad is None for weight in trainer.model.parameters())
    expected.total.backward()  # type: ignore[no-untyped-call]
    for gradient, weight in zip(found, [one for one in trainer.model.parameters() if one.grad is not None], strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)


def test_a_trainer_goes_when_nobody_needs_it(tmp_path: Path) -> None:
    """At once, not when cycles are next looked for: a device's memory is short."""
    tiny_trainer(tmp_path / "first").step()  # imports keep what is first
    trainer = tiny_trainer(tmp_path / "second")
    trainer.step()
    model = weakref.ref(trainer.model)
    gc.disable()
    try:
        del trainer
        assert model() is None
    finally:
        gc.enable()


def test_only_schedules_that_say_so_are_recorded() -> None:
    assert all(found.is_fixed for found in entries().values())
