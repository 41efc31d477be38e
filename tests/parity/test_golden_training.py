"""Training losses and their gradients against the authors' release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrt_core.checkpoint import load_model
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.official import official_name
from tests.helpers import GOLDEN, PLAIN_GOLDEN, RECURRENT_GOLDEN, golden_expected
from training.schedules.baseline import baseline
from training.schedules.interleaved import interleaved


def check_gradients(model: LatentRecurrentTransformer, expected: dict[str, Tensor]) -> None:
    norms = {official_name(name, model.config): weight.grad.norm() for name, weight in model.named_parameters()}
    assert set(norms) == {key.removeprefix("grad_norm.") for key in expected if key.startswith("grad_norm.")}
    for name, norm in norms.items():
        torch.testing.assert_close(norm, expected[f"grad_norm.{name}"][0], rtol=1e-3, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", RECURRENT_GOLDEN)
def test_interleaved(name: str, golden_checkpoints: dict[str, Path]) -> None:
    model, expected = load_model(golden_checkpoints[name]), golden_expected(name)
    meta = json.loads((GOLDEN / name / "checkpoint" / "meta_000100.json").read_text())["model_config"]
    losses = interleaved(
        model,
        expected["tokens"],
        expected["targets"],
        num_subsets=meta["interleaved_num_passes"],
        kv_refresh=meta["interleaved_kv_refresh"],
    )
    losses.total.backward()
    passes = torch.stack([one.token_losses.mean() for one in losses.passes])
    torch.testing.assert_close(passes, expected["interleaved_pass_losses"], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.total, expected["interleaved_loss"][0], rtol=0, atol=1e-5)
    check_gradients(model, expected)


def test_baseline(golden_checkpoints: dict[str, Path]) -> None:
    model, expected = load_model(golden_checkpoints[PLAIN_GOLDEN]), golden_expected(PLAIN_GOLDEN)
    losses = baseline(model, expected["tokens"], expected["targets"])
    losses.total.backward()
    torch.testing.assert_close(losses.total, expected["loss"][0], rtol=0, atol=1e-5)
    check_gradients(model, expected)
