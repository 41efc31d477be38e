"""Reading a prompt by windowed refinement against reading it token by token, in the engine and by the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrt_core.generate import read
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.refine import relative_change
from server.engine.engine import Engine
from tests.engines import make_engine, oracle, request, run
from tests.helpers import VARIANTS, contracting_model, random_ids, tiny_config, tiny_model

LENGTHS = [1, 2, 3, 15, 16, 17, 33, 60, 140]
RECURRENT = [name for name in VARIANTS if not name.startswith("plain")]


def prompt_latents(engine: Engine, ids: list[int]) -> Tensor:
    """The pool's latents [T, D] of a prompt once it is read."""
    [sequence] = engine.add(request(ids, max_tokens=2))
    while sequence.num_output_tokens == 0:
        engine.step()
    size = engine.config.block_size
    slots = [sequence.block_table[p // size] * size + p % size for p in range(len(ids))]
    latents = engine.runner.pool.latents[slots]
    engine.finish(sequence, "abort")
    return latents


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens_on_every_variant(variant: str) -> None:
    """Strong random recurrences: many passes, and still the same tokens."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    requests = [request(random_ids(length, seed=length), max_tokens=6) for length in LENGTHS]
    expected = [oracle(model, item) for item in requests]
    for prefill in ("window", "sequential"):
        assert run(make_engine(model, prefill=prefill, max_num_seqs=16), requests).token_ids == expected, prefill


@pytest.mark.parametrize("window", [2, 7, 64])
def test_same_tokens_for_any_window(window: int) -> None:
    model = contracting_model()
    requests = [request(random_ids(length, seed=length), max_tokens=6) for length in LENGTHS]
    done = run(make_engine(model, window=window), requests)
    assert done.token_ids == [oracle(model, item) for item in requests]


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("variant", RECURRENT)
def test_latents_are_within_the_tolerance(variant: str, tolerance: float) -> None:
    """For a contracting recurrence the error stays below the change that was tolerated (and float32's rounding)."""
    model, ids = contracting_model(variant), random_ids(120)
    latents = prompt_latents(make_engine(model, tolerance=tolerance, window=32), ids)
    assert float(relative_change(latents, read(model, ids).latents).max()) <= max(tolerance, 2e-5)


def test_zero_tolerance_is_sequential() -> None:
    model, ids = tiny_model(), random_ids(40)
    latents = prompt_latents(make_engine(model, tolerance=0.0), ids)
    assert float(relative_change(latents, read(model, ids).latents).max()) <= 2e-5


def test_windows_save_steps_when_the_recurrence_contracts() -> None:
    model, item = contracting_model(), request(random_ids(140), max_tokens=1)
    steps = {
        prefill: len(run(make_engine(model, prefill=prefill, tolerance=1e-4), [item]).steps)
        for prefill in ("window", "sequential")
    }
    assert steps["sequential"] == 140
    assert steps["window"] < 140 / 2


def memoryless(model: LatentRecurrentTransformer) -> LatentRecurrentTransformer:
    """The same weights with memory multiplied by nothing."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "memory" in name:
                weight.zero_()
    return model


def test_the_comparison_can_tell_a_lost_memory() -> None:
    item = request(random_ids(40), max_tokens=6)
    assert oracle(memoryless(tiny_model()), item) != oracle(tiny_model(), item)
