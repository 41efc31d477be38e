"""One step, native and by torch: decoding sequences and windows side by side over pools that hold the same."""

from __future__ import annotations

import math
from array import array

import numpy as np
import pytest
import torch

from lrt_core import kernels
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.native_model import NativeModel, Quantization
from lrt_core.paged import PagedPool
from lrt_core.sampling import SampleRow, sample
from lrt_core.sampling_params import SamplingParams
from lrt_core.step import Layout, PagedStep, StepResult, run_step
from tests.helpers import VARIANTS, tiny_config, tiny_model

needs_native = pytest.mark.skipif(not kernels.is_native(), reason="the package's build found no C++ compiler")
BLOCK_SIZE, NUM_BLOCKS = 4, 40
STARTS, WIDTHS = (45, 0, 7, 3, 0), (1, 1, 9, 16, 2)
"""First position and rows of every sequence; the first outgrows the short attention window."""


def filled_pool(model: LatentRecurrentTransformer) -> PagedPool:
    """Random keys, values and latents, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    pool = PagedPool(model.config, NUM_BLOCKS * BLOCK_SIZE, torch.float32)
    for part in (pool.keys, pool.values, pool.latents[:-1]):
        part.normal_(generator=generator)
    return pool


def make_step(vocab_size: int, draws: bytearray | None = None) -> PagedStep:
    """Blocks in no order; half of each window has been computed before. With draws, the first two and the last sequence's next
    tokens are due."""
    rng = np.random.default_rng(0)
    order = list(rng.permutation(NUM_BLOCKS))
    step = PagedStep(array("q"), array("q"), array("i"), BLOCK_SIZE, draws)
    for number, (start, width) in enumerate(zip(STARTS, WIDTHS, strict=True)):
        table = [int(order.pop()) for _ in range(-(-(start + width) // BLOCK_SIZE))]
        num_wanted = {0: 1, 1: 1, 4: 2}.get(number, 0)
        step.tokens.extend(rng.integers(vocab_size, size=width).tolist())
        step.sequences.extend((start, width, start + width // 2, len(table), num_wanted, 3 * number))
        step.tables.extend(table)
    return step


def settled_rows(layout: Layout, result: StepResult) -> list[int]:
    starts = layout.row_starts.tolist()
    return [row for start, count in zip(starts, result.num_settled, strict=False) for row in range(start, start + count)]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@needs_native
@pytest.mark.parametrize("tolerance", [0.0, 1.2, 9.0])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_native_and_torch_take_the_same_step(variant: str, tolerance: float, instruction_set: str) -> None:
    """Tolerances at which one row of a window settles, some do and all do."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    theirs, step = filled_pool(model), make_step(model.config.vocab_size)
    expected = run_step(model, step, theirs, tolerance)
    native = NativeModel(model, max_len=64)
    for repetition in range(2):  # the second over a workspace that is no longer zeros
        ours = filled_pool(model)
        actual = native.run_step(step, ours, tolerance)
        assert (actual.num_settled, actual.is_finite) == (expected.num_settled, expected.is_finite), repetition
        assert actual.residuals == [value if value is None else pytest.approx(value, rel=1e-3) for value in expected.residuals]
        close(actual.hidden, expected.hidden)
        for own, other in ((ours.keys, theirs.keys), (ours.values, theirs.values), (ours.latents, theirs.latents)):
            close(own, other)
    if model.config.recurrence is not None:
        if tolerance == 0.0:
            assert expected.num_settled == [1] * len(WIDTHS)
        elif tolerance == 9.0:
            assert expected.num_settled == list(WIDTHS)
    else:
        assert (expected.num_settled, expected.residuals) == (list(WIDTHS), [None] * len(WIDTHS))


@needs_native
@pytest.mark.parametrize("tolerance", [0.0, 9.0])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_step_in_bfloat16_is_that_of_the_same_weights_in_float32(
    variant: str, tolerance: float, instruction_set: str
) -> None:
    """But for the rounding of keys and values, and of activations where the processor multiplies pairs of bfloat16."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data = weight.data.bfloat16().float()
    exact, step = filled_pool(model), make_step(model.config.vocab_size)
    expected = run_step(model, step, exact, tolerance)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data = weight.data.bfloat16()
    full = filled_pool(model)
    pool = PagedPool(model.config, NUM_BLOCKS * BLOCK_SIZE, torch.bfloat16)
    for own, other in ((pool.keys, full.keys), (pool.values, full.values), (pool.latents, full.latents)):
        own.copy_(other)
    actual = NativeModel(model, max_len=64).run_step(step, pool, tolerance)
    assert (actual.num_settled, actual.is_finite) == (expected.num_settled, expected.is_finite)
    for own, other in ((actual.hidden, expected.hidden), (pool.latents, exact.latents), (pool.keys, exact.keys)):
        assert (own.float() - other).abs().mean() < 0.01
        assert (own.float() - other).abs().max() < 0.15


@needs_native
@pytest.mark.parametrize("quantize", ["none", "int8"])
@torch.no_grad()
def test_a_workspace_is_as_good_for_fewer_rows(quantize: Quantization, instruction_set: str) -> None:
    """24 numbers a row, so that operands are padded; bit-equal after a larger step and after one of no numbers at all."""
    model = tiny_model(tiny_config(hidden_size=24, num_heads=2, num_kv_heads=1))
    used, step = NativeModel(model, 64, quantize), make_step(model.config.vocab_size)
    small = PagedStep(step.tokens[:2], step.sequences[:12], step.tables, BLOCK_SIZE)
    expected = NativeModel(model, 64, quantize).run_step(small, filled_pool(model), 0.0)
    broken = filled_pool(model)
    broken.values.fill_(torch.nan)
    for larger in (filled_pool(model), broken):
        used.run_step(step, larger, 9.0)
        pool = filled_pool(model)
        actual = used.run_step(small, pool, 0.0)
        assert torch.equal(actual.hidden, expected.hidden) and actual.is_finite == [True, True]


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
@torch.no_grad()
def test_above_the_source_nothing_is_computed_for_rows_that_have_not_settled(native: bool) -> None:
    model = tiny_model(tiny_config(**VARIANTS["upper-middle-source"]))
    pool, before = filled_pool(model), filled_pool(model)
    step = make_step(model.config.vocab_size)
    result = NativeModel(model, max_len=64).run_step(step, pool, 0.0) if native else run_step(model, step, pool, 0.0)
    layout = step.lay_out(pool.zero_row)
    settled = settled_rows(layout, result)
    others = sorted(set(range(step.num_rows)) - set(settled))
    slots = torch.from_numpy(layout.rows[2])
    assert others and len(result.hidden) == len(settled)
    for layer in range(model.config.num_layers):
        is_same = (pool.keys[layer][slots] == before.keys[layer][slots]).flatten(1).all(1)
        is_above = layer > model.config.source_layer
        assert not is_same[settled].any()
        assert bool(is_same[others].all()) == is_above, layer


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
@torch.no_grad()
def test_whose_states_are_no_numbers_is_told_alone(native: bool) -> None:
    """A value that is none is seen by one sequence, which decodes beside another, and by the settled row of a third."""
    model = tiny_model()
    pool = filled_pool(model)
    step = make_step(model.config.vocab_size)
    layout = step.lay_out(pool.zero_row)
    for sequence in (0, 2):
        block = int(layout.tables[layout.table_starts[sequence] + STARTS[sequence] // BLOCK_SIZE - 1])
        pool.values[0, block * BLOCK_SIZE] = torch.nan
    result = NativeModel(model, max_len=64).run_step(step, pool, 0.0) if native else run_step(model, step, pool, 0.0)
    assert result.is_finite == [False, True, False, True, True]
    assert result.num_settled == [1] * len(WIDTHS)
    assert result.residuals[2] is not None and math.isnan(result.residuals[2])
    assert result.residuals[3] is not None and math.isfinite(result.residuals[3])


@needs_native
@pytest.mark.parametrize("tolerance", [0.0, 9.0])
@torch.no_grad()
def test_a_step_draws_the_tokens_that_its_logits_give(tolerance: float) -> None:
    """Where the last sequence's window settles, and where its next token is not due yet."""
    model = tiny_model()
    native = NativeModel(model, max_len=64)
    hot, filtered = SamplingParams(temperature=1.5), SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01)
    for seed in (0, 5, -1, 2**63 + 3, 2**70):
        params = [SamplingParams(temperature=0), hot, hot, hot, filtered]
        draws = bytearray(b"".join(own.pack(seed + number) for number, own in enumerate(params)))
        result = native.run_step(make_step(model.config.vocab_size, draws), filled_pool(model), tolerance)
        last = torch.tensor(result.offsets[1:]) - 1
        rows = [SampleRow(own, seed + number, 3 * number) for number, own in enumerate(params)]
        expected = sample(native.logits(result.hidden[last]), rows).tolist()
        is_due = [True, True, False, False, tolerance > 0]
        assert result.ids == [token if due else -1 for token, due in zip(expected, is_due, strict=True)]
    undrawn = native.run_step(make_step(model.config.vocab_size), filled_pool(model), tolerance)
    assert undrawn.ids is None
