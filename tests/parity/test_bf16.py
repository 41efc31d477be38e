"""The engine in bfloat16 against the oracle in float32, and its windows against its own token-by-token reading."""

from __future__ import annotations

import copy

import pytest
import torch

from lrt_core.generate import read
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.refine import relative_change
from server.engine.config import PrefillMode
from server.engine.loader import DEFAULT_TOLERANCE
from tests.engines import make_engine, request, run
from tests.helpers import VARIANTS, contracting_model, random_ids
from tests.parity.test_window import RECURRENT, prompt_latents

TOLERANCE = DEFAULT_TOLERANCE[torch.bfloat16]


def as_loaded(model: LatentRecurrentTransformer) -> LatentRecurrentTransformer:
    """The model as a checkpoint gives it in bfloat16: matrices rounded, scales as they were."""
    rounded = copy.deepcopy(model)
    for weight in rounded.parameters():
        if weight.ndim >= 2:
            weight.data = weight.data.to(torch.bfloat16)
    return rounded


def in_float32(model: LatentRecurrentTransformer) -> LatentRecurrentTransformer:
    """The rounded weights, computed with in float32: what is left is the arithmetic's error."""
    return copy.deepcopy(model).float()


@pytest.mark.parametrize("prefill", ["window", "sequential"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs_of_a_long_prompt(variant: str, prefill: PrefillMode) -> None:
    """Within 0.1 nats everywhere and 0.02 on average of the unrounded float32 model."""
    model, ids = contracting_model(variant), random_ids(100)
    exact = torch.log_softmax(read(model, ids).logits, -1)
    engine = make_engine(as_loaded(model), prefill=prefill, tolerance=TOLERANCE)
    [[outcome]] = run(engine, [request(ids, 0, prompt_logprobs=0)]).outcomes
    assert outcome.prompt_logprobs is not None
    actual = torch.tensor([entry.logprob for entry in outcome.prompt_logprobs[1:]])
    error = (actual - exact[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]).abs()
    assert float(error.max()) < 0.1
    assert float(error.mean()) < 0.02


@pytest.mark.parametrize("variant", RECURRENT)
def test_windows_add_no_more_than_the_tolerance(variant: str) -> None:
    """Latents of both readings stray from float32 by rounding; those read in windows on average by at most the tolerance more.

    The tolerance is the type's own rounding step, so the worst one may lie a step further still."""
    model, ids = as_loaded(contracting_model(variant)), random_ids(100)
    exact = read(in_float32(model), ids).latents
    errors = {}
    for prefill in ("window", "sequential"):
        engine = make_engine(model, prefill=prefill, tolerance=TOLERANCE, window=32)
        errors[prefill] = relative_change(prompt_latents(engine, ids), exact)
    assert float(errors["window"].max()) <= float(errors["sequential"].max()) + 2 * TOLERANCE
    assert float(errors["window"].mean()) <= float(errors["sequential"].mean()) + TOLERANCE
    assert float(errors["sequential"].max()) < 8 * TOLERANCE


def test_the_head_gives_float32() -> None:
    model = as_loaded(contracting_model())
    assert model.dtype == torch.bfloat16
    assert read(model, [1, 2]).logits.dtype == torch.float32
