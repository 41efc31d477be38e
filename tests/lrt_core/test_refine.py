"""Parallel passes to a tolerance against the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from lrt_core.generate import read
from lrt_core.refine import refine, relative_change
from tests.helpers import VARIANTS, contracting_model, tiny_config, tiny_model

NAN = math.nan
LENGTH = 24
RECURRENT = [name for name in VARIANTS if not name.startswith("plain")]


def random_tokens(batch_size: int = 1, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 280, (batch_size, length), generator=torch.Generator().manual_seed(3))


def test_relative_change() -> None:
    new, old = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    assert relative_change(new, old).tolist() == [0.0, 1.0, 0.0]
    halves = relative_change(new.to(torch.bfloat16), 0.5 * new.to(torch.bfloat16))
    assert halves.dtype == torch.float32
    assert halves.tolist() == [0.5, 0.5, 0.0]
    assert math.isnan(float(relative_change(torch.tensor([NAN]), torch.tensor([1.0]))))


@pytest.mark.parametrize("variant", RECURRENT)
def test_as_many_passes_as_tokens_are_exact(variant: str) -> None:
    """Whether or not these random weights contract; the tolerance of 0 keeps it from stopping early."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    tokens = random_tokens()
    refined = refine(model, tokens, tolerance=-1.0)
    assert len(refined.residuals) == LENGTH
    expected = read(model, tokens[0].tolist())
    torch.testing.assert_close(refined.latents[0], expected.latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.logits(refined.hidden)[0], expected.logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_passes", [1, 2, 5])
def test_leading_positions_are_exact_after_each_pass(num_passes: int) -> None:
    model = tiny_model()
    tokens = random_tokens()
    refined = refine(model, tokens, tolerance=0.0, max_passes=num_passes)
    assert len(refined.residuals) == num_passes
    error = (refined.latents[0] - read(model, tokens[0].tolist()).latents).abs().amax(-1)
    assert float(error[:num_passes].max()) < 1e-4
    assert float(error[num_passes:].max()) > 1e-3, "the rest is not there yet"


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("variant", RECURRENT)
def test_stops_at_its_tolerance(variant: str, tolerance: float) -> None:
    model = contracting_model(variant)
    tokens = random_tokens()
    refined = refine(model, tokens, tolerance)
    assert refined.residuals[-1] <= tolerance
    assert all(residual > tolerance for residual in refined.residuals[:-1])
    error = relative_change(refined.latents[0], read(model, tokens[0].tolist()).latents)
    assert float(error.max()) <= max(2 * tolerance, 1e-5)


def test_contracting_weights_need_few_passes() -> None:
    assert len(refine(contracting_model("layerwise"), random_tokens(), 1e-3).residuals) < LENGTH / 2


@pytest.mark.parametrize("variant", ["plain", "plain-bare"])
def test_plain_model_takes_one_pass(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    tokens = random_tokens()
    refined = refine(model, tokens, 1e-6)
    assert refined.residuals == []
    expected = read(model, tokens[0].tolist())
    torch.testing.assert_close(model.logits(refined.hidden)[0], expected.logits, atol=1e-4, rtol=0)


def test_one_token_takes_one_pass() -> None:
    model = tiny_model()
    refined = refine(model, random_tokens(length=1), 1e-6)
    assert refined.residuals == [0.0]
    torch.testing.assert_close(refined.latents[0], read(model, random_tokens(length=1)[0].tolist()).latents)


def test_a_batch_stops_when_its_slowest_row_has() -> None:
    model = contracting_model("layerwise")
    tokens = random_tokens(batch_size=3)
    together = refine(model, tokens, 1e-4)
    alone = [refine(model, row.unsqueeze(0), 1e-4) for row in tokens]
    assert len(together.residuals) == max(len(row.residuals) for row in alone)
