"""Native sampling against its torch twin: thousands of rows of every kind, every combination of parameters.

Where the two differ a rounding error must have decided, which a third way of computing, in extended precision, confirms.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from lrt_core.kernels import native
from lrt_core.kernels.sampling import Draws, draw, draw_twin, is_native, top_logprobs, top_logprobs_twin
from lrt_core.sampling import SampleRow, sample, sample_twin
from lrt_core.sampling_params import SamplingParams

needs_native = pytest.mark.skipif(not is_native(), reason="the package's build found no C++ compiler")

ROUNDING = 1e-12
LAST_UNIFORM = 1 - 2.0**-32
NUM_ROWS = {1: 300, 2: 1000, 7: 2500, 320: 2500, 5000: 600, 32768: 200, 50304: 120}
"""Rows drawn for each vocabulary; they take torch some milliseconds each where it is large."""

TEMPERATURES = (0.0, 5e-324, 1e-300, 0.01, 0.7, 1.0, 1.0, 1.3, 100.0, 1e308)
TOP_PS = (1.0, 1.0, 1e-9, 0.1, 0.3, 0.5, 0.9, 0.95, 0.999999)
MIN_PS = (0.0, 0.0, 1e-40, 0.01, 0.1, 0.5, 1.0)
KINDS = (
    "flat", "normal", "peaked", "steep", "coarse", "bfloat16", "equal", "masked", "banned", "one left", "outlier", "close",
)  # fmt: skip


def make_logits(kind: str, vocab_size: int, generator: torch.Generator) -> Tensor:
    """A row [V]: what models give, and what breaks samplers (ties, masses of -inf, outliers, differences below rounding)."""
    x = torch.randn(vocab_size, generator=generator)
    hidden = torch.rand(vocab_size, generator=generator) < 0.9
    hidden[int(torch.randint(vocab_size, (1,), generator=generator))] = False
    rows = {
        "flat": 0.01 * x,
        "normal": x,
        "peaked": 5 * x + 10,
        "steep": 100 * x,
        "coarse": (2 * x).round() / 2,
        "bfloat16": (3 * x).bfloat16().float(),
        "equal": torch.full_like(x, 1.5),
        "masked": x.masked_fill(hidden, -torch.inf),
        "banned": torch.where(hidden, x - 100, x),
        "one left": torch.full_like(x, -torch.inf).index_fill(0, x.argmax(), -3e38),
        "outlier": torch.where(x == x.min(), x + 55, x),
        "close": (1e-30 * x).index_fill(0, x.argmin(), 10.0),
    }
    return rows[kind]


def make_draws(num_rows: int, vocab_size: int, seed: int) -> Draws:
    rng = random.Random(seed)
    top_ks = (0, 0, -1, 1, 2, 5, 50, 400, vocab_size // 3 + 1, vocab_size, vocab_size + 10)
    columns = [[rng.choice(values) for _ in range(num_rows)] for values in (TEMPERATURES, top_ks, TOP_PS, MIN_PS)]
    uniforms = [rng.choice((0.0, LAST_UNIFORM, *([rng.random()] * 20))) for _ in range(num_rows)]
    return Draws(*columns, uniforms)


def make_batch(vocab_size: int) -> tuple[Tensor, Draws]:
    generator = torch.Generator().manual_seed(vocab_size)
    rows = [make_logits(KINDS[i % len(KINDS)], vocab_size, generator) for i in range(NUM_ROWS[vocab_size])]
    return torch.stack(rows), make_draws(len(rows), vocab_size, vocab_size)


def row_of(draws: Draws, row: int) -> Draws:
    return Draws(*([getattr(draws, name)[row]] for name in ("temperatures", "top_ks", "top_ps", "min_ps", "uniforms")))


def may_be_drawn(logits: Tensor, draws: Draws, row: int, token: int) -> bool:
    """Whether the token's share holds the uniform number once that, top_p and min_p may move by a rounding error."""
    x = logits.numpy().astype(np.longdouble)
    with np.errstate(over="ignore", under="ignore"):
        # In float64, as both compute it: the order of what is equal there hangs on it.
        scaled = (logits.double().numpy() - float(x.max())) / draws.temperatures[row]
        order = np.argsort(-scaled, kind="stable") if draws.is_filtered(row) else np.arange(len(x))
        weights = np.exp(scaled[order].astype(np.longdouble))
    if draws.top_ks[row] > 0:
        weights[draws.top_ks[row] :] = 0
    shares = weights / weights.sum()
    before = np.cumsum(shares) - shares
    for p_error, min_error in itertools.product((-ROUNDING, 0, ROUNDING), repeat=2):
        kept = shares.copy()
        if draws.top_ps[row] < 1:
            kept[before >= draws.top_ps[row] + p_error] = 0
        kept[shares < min(draws.min_ps[row] * (1 + min_error), 1) * shares.max()] = 0
        upper = np.cumsum(kept / kept.sum())
        place = int(np.flatnonzero(order == token)[0])
        lower = upper[place - 1] if place else 0.0
        if kept[place] > 0 and lower - ROUNDING <= draws.uniforms[row] <= upper[place] + ROUNDING:
            return True
    return False


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", NUM_ROWS)
def test_draws_are_the_twins(vocab_size: int) -> None:
    logits, draws = make_batch(vocab_size)
    actual, expected = draw(logits, draws).tolist(), draw_twin(logits, draws).tolist()
    different = [row for row, (ours, theirs) in enumerate(zip(actual, expected, strict=True)) if ours != theirs]
    wrong = [row for row in different if not may_be_drawn(logits[row], draws, row, actual[row])]
    assert not wrong, [(KINDS[row % len(KINDS)], row_of(draws, row), actual[row], expected[row]) for row in wrong]
    assert len(different) <= max(2, len(actual) // 50), "rounding decides seldom"


def test_what_may_be_drawn() -> None:
    """The judge of differences knows wrong tokens."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for uniform, right in ((0.1, 0), (0.6, 1), (0.8, 2), (0.99, 3)):
        draws = Draws([1.0], [0], [1.0], [0.0], [uniform])
        assert [token for token in range(4) if may_be_drawn(logits, draws, 0, token)] == [right]
    filtered = Draws([1.0], [3], [0.7], [0.3], [0.99])
    assert [token for token in range(4) if may_be_drawn(logits, filtered, 0, token)] == [1]


@needs_native
@pytest.mark.parametrize("vocab_size", [1, 63, 320, 5000])
def test_greedy_takes_the_first_of_the_largest(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (50, vocab_size), generator=generator).float()
    logits[1] = -torch.inf
    logits[2, -1] = torch.inf
    logits[3, vocab_size // 2 :] = torch.nan
    logits[4] = -0.0
    logits[4, -1] = 0.0
    greedy = Draws([0.0] * 50, [0] * 50, [1.0] * 50, [0.0] * 50, [0.0] * 50)
    assert draw(logits, greedy).tolist() == draw_twin(logits, greedy).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("is_filtered", [False, True])
@pytest.mark.parametrize("with_native", [False, True])
def test_rows_without_a_distribution_give_what_argmax_gives(with_native: bool, is_filtered: bool) -> None:
    logits = torch.zeros(4, 300)
    logits[0, 7] = torch.nan
    logits[1] = -torch.inf
    logits[2, 99] = torch.inf
    logits[3, 5] = 50.0
    draws = Draws([1.0] * 4, [9 * is_filtered] * 4, [1.0] * 4, [0.0] * 4, [0.5] * 4)
    with native(with_native):
        assert draw(logits, draws).tolist() == [7, 0, 99, 5]
        own, values, _ = top_logprobs(logits, torch.tensor([7, 0, 99, 5]), 3)
    assert own[:3].isnan().all() and values[:3].isnan().all() and own[3] == values[3, 0] == 0


@needs_native
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 320, 5000, 50304])
def test_top_logprobs_are_the_twins(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.stack([make_logits(kind, vocab_size, generator) for kind in KINDS])
    ids = torch.randint(vocab_size, (len(logits),), generator=generator)
    for k in sorted({0, 1, min(5, vocab_size), min(100, vocab_size)}):
        own, values, top_ids = top_logprobs(logits, ids, k)
        twin_own, twin_values, _ = top_logprobs_twin(logits.double(), ids, k)
        torch.testing.assert_close(own, twin_own.float(), atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(values, twin_values.float(), atol=2e-6, rtol=1e-6)
        # Equals stand in the order of their ids, as a stable sort leaves them.
        assert torch.equal(top_ids, logits.sort(dim=-1, descending=True, stable=True).indices[:, :k])
        again, _, _ = top_logprobs(logits, top_ids[:, -1] if k else ids, 0)
        assert torch.equal(again, values[:, -1] if k else own)


@needs_native
@pytest.mark.parametrize("vocab_size", [320, 5000])
def test_a_row_is_the_same_alone_and_with_any_number_of_threads(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.stack([make_logits(KINDS[i % len(KINDS)], vocab_size, generator) for i in range(150)])
    draws = make_draws(len(logits), vocab_size, 1)
    together, before = draw(logits, draws), torch.get_num_threads()
    own, values, top_ids = top_logprobs(logits, together, 5)
    for row in range(len(logits)):
        assert draw(logits[row : row + 1], row_of(draws, row)).tolist() == [together[row]]
        alone = top_logprobs(logits[row : row + 1], together[row : row + 1], 5)
        assert all(torch.equal(x[0], y[row]) for x, y in zip(alone, (own, values, top_ids), strict=True))
    torch.set_num_threads(3)
    try:
        assert torch.equal(draw(logits, draws), together)
        threaded = top_logprobs(logits, together, 5)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(threaded, (own, values, top_ids), strict=True))


@needs_native
def test_logits_in_any_layout() -> None:
    """Rows apart, one row for all, and columns apart, which the twin takes."""
    wide = torch.randn(6, 700, generator=torch.Generator().manual_seed(0))
    draws = make_draws(6, 320, 5)
    for logits in (wide[:, 11:331], wide[:1, :320].expand(6, -1), wide[:, :640:2]):
        assert draw(logits, draws).tolist() == draw_twin(logits.contiguous(), draws).tolist()


@needs_native
def test_whole_parameters() -> None:
    """`sample` and the oracle's `sample_twin` agree with penalties, bias and allowed ids."""
    generator, rng = torch.Generator().manual_seed(2), random.Random(2)
    rows = []
    for seed in range(400):
        params = SamplingParams(
            temperature=rng.choice((0.0, 0.8, 1.0)),
            top_p=rng.choice((1.0, 0.8)),
            top_k=rng.choice((0, 20)),
            min_p=rng.choice((0.0, 0.05)),
            presence_penalty=rng.choice((0.0, 0.7)),
            frequency_penalty=rng.choice((0.0, -0.3)),
            repetition_penalty=rng.choice((1.0, 1.3)),
            logit_bias=rng.choice(({}, {3: 4.0, 7: -100.0})),
            allowed_token_ids=rng.choice((None, tuple(range(0, 320, 3)))),
        )
        prompt, output = ([rng.randrange(320) for _ in range(rng.randrange(30))] for _ in range(2))
        rows.append(SampleRow(params, seed, len(output), prompt, output))
    logits = 3 * torch.randn(len(rows), 320, generator=generator)
    assert sample(logits, rows).tolist() == sample_twin(logits, rows).tolist()
