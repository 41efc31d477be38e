"""Sampling on small distributions whose answers are worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lrt_core.history import TokenHistory
from lrt_core.sampling import SampleRow, sample, top_logprobs, uniform
from lrt_core.sampling_params import SamplingParams

PROBS = (0.5, 0.25, 0.125, 0.0625, 0.0625)
DRAWS = 4000


def log(*probs: float) -> Tensor:
    return torch.tensor([probs]).log()


def support(probs: tuple[float, ...] = PROBS, **params: Any) -> dict[int, float]:
    """Frequencies of every id that DRAWS seeds give."""
    rows = [SampleRow(SamplingParams(**params), seed) for seed in range(DRAWS)]
    counts = Counter(sample(log(*probs).expand(DRAWS, -1), rows).tolist())
    return {token: count / DRAWS for token, count in sorted(counts.items())}


def assert_frequencies(actual: dict[int, float], expected: dict[int, float]) -> None:
    """The same ids, each within four standard deviations (seeds are fixed: no chance is left)."""
    assert actual.keys() == expected.keys()
    for token, p in expected.items():
        assert abs(actual[token] - p) <= 4 * math.sqrt(p * (1 - p) / DRAWS), token


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 2.9]])
    assert sample(logits, [SampleRow(SamplingParams(temperature=0))] * 2).tolist() == [1, 0]


def test_frequencies_follow_the_probabilities() -> None:
    assert_frequencies(support(), dict(enumerate(PROBS)))


def test_temperature_sharpens_and_flattens() -> None:
    """p^(1/T) normalised: squares at 0.5, roots at 2."""
    for temperature in (0.5, 2.0):
        powers = [p ** (1 / temperature) for p in PROBS]
        expected = {token: power / sum(powers) for token, power in enumerate(powers)}
        assert_frequencies(support(temperature=temperature), expected)


@pytest.mark.parametrize("temperature", [1e-4, 1e-300, 5e-324])
def test_tiny_temperatures_are_greedy_and_finite(temperature: float) -> None:
    assert support(temperature=temperature) == {0: 1.0}
    assert support(temperature=temperature, top_p=0.9) == {0: 1.0}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"top_k": 1}, {0: 1.0}),
        ({"top_k": 2}, {0: 2 / 3, 1: 1 / 3}),
        ({"top_k": 100}, dict(enumerate(PROBS))),
        ({"top_k": -1}, dict(enumerate(PROBS))),
        ({"top_p": 0.5}, {0: 1.0}),
        ({"top_p": 0.51}, {0: 2 / 3, 1: 1 / 3}),
        ({"top_p": 0.75}, {0: 2 / 3, 1: 1 / 3}),
        ({"top_p": 0.76}, {0: 4 / 7, 1: 2 / 7, 2: 1 / 7}),
        ({"top_p": 1e-9}, {0: 1.0}),
        ({"min_p": 0.499}, {0: 2 / 3, 1: 1 / 3}),
        ({"min_p": 0.501}, {0: 1.0}),
        ({"min_p": 0.249}, {0: 4 / 7, 1: 2 / 7, 2: 1 / 7}),
        ({"min_p": 1.0}, {0: 1.0}),
    ],
)
def test_filters(params: dict[str, Any], expected: dict[int, float]) -> None:
    """top_p keeps a token while the mass before it is below p; min_p compares with the likeliest."""
    assert_frequencies(support(**params), expected)


def test_top_p_drops_what_comes_after_exactly_its_mass() -> None:
    """Four equal ones are a quarter each without rounding."""
    assert_frequencies(support((0.25, 0.25, 0.25, 0.25), top_p=0.5), {0: 0.5, 1: 0.5})


def test_filters_find_their_tokens_in_any_order() -> None:
    assert_frequencies(support((0.0625, 0.5, 0.0625, 0.125, 0.25), top_k=2), {1: 2 / 3, 4: 1 / 3})


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # Temperature first: at 0.5 the squares are 16, 4, 1, ... of 21.5; the first has 0.744 and alone reaches 0.7.
        ({"temperature": 0.5, "top_p": 0.7}, {0: 1.0}),
        ({"temperature": 1.0, "top_p": 0.7}, {0: 2 / 3, 1: 1 / 3}),
        # top_k first: of the kept three the first has 4/7 = 0.571, so a top_p of 0.55 keeps one and not two.
        ({"top_k": 3, "top_p": 0.55}, {0: 1.0}),
        ({"top_p": 0.55}, {0: 2 / 3, 1: 1 / 3}),
        # min_p is relative, so what was dropped before changes nothing: 0.25 of the likeliest keeps three, top_k two of them.
        ({"top_k": 2, "min_p": 0.249}, {0: 2 / 3, 1: 1 / 3}),
        # Bias before temperature: 2 ln 2 lifts the third to the first's place.
        ({"logit_bias": {2: 2 * math.log(2)}, "top_k": 2}, {0: 0.5, 2: 0.5}),
        # Allowed ids before the filters: top_k counts only what is allowed.
        ({"allowed_token_ids": (1, 2, 4), "top_k": 2}, {1: 2 / 3, 2: 1 / 3}),
        ({"allowed_token_ids": (1, 2), "top_p": 0.66}, {1: 1.0}),
        ({"allowed_token_ids": (3,)}, {3: 1.0}),
    ],
)
def test_order_of_operations(params: dict[str, Any], expected: dict[int, float]) -> None:
    assert_frequencies(support(**params), expected)


def adjusted_winner(logits: list[float], row: SampleRow) -> int:
    return int(sample(torch.tensor([logits]), [row]))


def test_bias_and_allowed_ids_bind_greedy_too() -> None:
    greedy = SamplingParams(temperature=0, logit_bias={2: 1.5})
    assert adjusted_winner([2.0, 1.0, 1.0], SampleRow(greedy)) == 2
    assert adjusted_winner([2.0, 1.0, 0.4], SampleRow(greedy)) == 0
    assert adjusted_winner([2.0, 1.0, 0.5], SampleRow(SamplingParams(temperature=0, allowed_token_ids=(1, 2)))) == 1


def test_frequency_and_presence_penalties_count_the_output() -> None:
    """0 was generated twice, 1 once; the prompt counts nothing."""
    history = {"prompt_ids": (2, 2, 2), "output_ids": (0, 1, 0)}
    logits = [2.0, 1.5, 0.9]
    assert adjusted_winner(logits, SampleRow(SamplingParams(temperature=0, presence_penalty=0.5), **history)) == 0
    assert adjusted_winner(logits, SampleRow(SamplingParams(temperature=0, frequency_penalty=0.45), **history)) == 0
    assert adjusted_winner(logits, SampleRow(SamplingParams(temperature=0, frequency_penalty=0.55), **history)) == 1
    assert adjusted_winner(logits, SampleRow(SamplingParams(temperature=0, frequency_penalty=1.0), **history)) == 2
    assert adjusted_winner(logits, SampleRow(SamplingParams(temperature=0, presence_penalty=1.2), **history)) == 2
    rewarded = SamplingParams(temperature=0, presence_penalty=-1.0)
    assert adjusted_winner([0.5, 0.0, 1.4], SampleRow(rewarded, **history)) == 0


def test_repetition_penalty_divides_positive_and_multiplies_negative() -> None:
    """Prompt and output both count."""
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    row = SampleRow(params, prompt_ids=(0,), output_ids=(1,))
    assert adjusted_winner([4.0, 3.0, 2.1], row) == 2
    assert adjusted_winner([4.0, 3.0, 1.9], row) == 0
    assert adjusted_winner([-1.0, -1.0, -1.9], row) == 2
    assert adjusted_winner([-0.9, -1.0, -1.9], row) == 0


def test_penalties_are_exact_numbers() -> None:
    """Seen by the odds that they leave: 2 ln 2 off the first makes 0.5 : 0.25 into 0.125 : 0.25."""
    rows = [SampleRow(SamplingParams(frequency_penalty=math.log(2)), seed, output_ids=(0, 0)) for seed in range(DRAWS)]
    counts = Counter(sample(log(2 / 3, 1 / 3).expand(DRAWS, -1), rows).tolist())
    assert_frequencies({token: counts[token] / DRAWS for token in sorted(counts)}, {0: 1 / 3, 1: 2 / 3})


def test_logits_are_left_alone() -> None:
    logits = log(*PROBS)
    before = logits.clone()
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 1.0}, allowed_token_ids=(0, 1), top_k=1
    )
    sample(logits, [SampleRow(params, prompt_ids=(0,), output_ids=(1,))])
    assert torch.equal(logits, before)


def mixed_rows() -> list[SampleRow]:
    variants = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(presence_penalty=1.0, repetition_penalty=1.3),
        SamplingParams(temperature=0, logit_bias={3: 5.0}),
        SamplingParams(allowed_token_ids=(1, 5, 9)),
    ]
    return [SampleRow(params, seed, seed % 7, (1, 2, 3), (3, 4, 4)) for seed in range(5) for params in variants]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = mixed_rows()
    logits = 3 * torch.randn(len(rows), 301, generator=torch.Generator().manual_seed(0))
    together = sample(logits, rows).tolist()
    assert together == [int(sample(logits[i : i + 1], [row])) for i, row in enumerate(rows)]
    assert together[::-1] == sample(logits.flip(0), rows[::-1]).tolist()
    assert len(set(together)) > 10


def test_seed_and_step_decide() -> None:
    logits = torch.zeros(1, 1000)
    drawn = {
        (seed, step): int(sample(logits, [SampleRow(SamplingParams(), seed, step)])) for seed in range(9) for step in range(9)
    }
    for (seed, step), token in drawn.items():
        assert int(sample(logits, [SampleRow(SamplingParams(), seed, step)])) == token
    assert len(set(drawn.values())) > 70


def test_uniform_is_uniform_and_below_one() -> None:
    numbers = [uniform(seed, step) for seed in (0, 1, 2**63, -1, 2**64 + 5) for step in range(2000)]
    assert all(0 <= x < 1 for x in numbers)
    buckets = Counter(int(16 * x) for x in numbers)
    expected = len(numbers) / 16
    assert sum((buckets[b] - expected) ** 2 / expected for b in range(16)) < 37.7, "chi-square, 15 degrees, p = 0.001"
    covariance = sum((a - 0.5) * (b - 0.5) for a, b in pairwise(numbers)) / len(numbers)
    assert abs(covariance) < 4 / 12 / math.sqrt(len(numbers))
    assert uniform(1, 0) != uniform(0, 1)


def test_the_last_token_can_be_drawn_and_an_impossible_one_cannot() -> None:
    """The largest uniform number stays within the vocabulary, the smallest steps over zeros."""
    probs = (0.0, 0.5, 0.0, 0.5, 0.0)
    assert support(probs).keys() == {1, 3}
    assert support(probs, top_p=0.999).keys() == {1, 3}


def test_top_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([4, 0, 49])
    own, values, top_ids = top_logprobs(logits, ids, 50)
    exact = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(own.double(), exact.gather(1, ids[:, None])[:, 0], atol=1e-6, rtol=0)
    assert (values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(values.double(), exact.gather(1, top_ids), atol=1e-6, rtol=0)
    for row in range(3):
        assert own[row] == values[row][top_ids[row] == ids[row]], "bit for bit the entry among the top ones"


def test_no_alternatives() -> None:
    own, values, ids = top_logprobs(log(0.75, 0.25), torch.tensor([1]), 0)
    assert own.tolist() == pytest.approx([math.log(0.25)])
    assert values.shape == ids.shape == (1, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("allowed_token_ids", ()),
        ("logit_bias", {0: math.nan}),
        ("logit_bias", {0: -math.inf}),
    ],
)
def test_bad_parameters_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("words", "output", "winner"),
    [
        (((0,),), (), 1),
        (((0,),), (3, 3), 1),
        (((3, 0),), (), 0),
        (((3, 0),), (3,), 1),
        (((3, 0),), (0, 3), 1),
        (((3, 0),), (3, 2), 0),
        (((2, 3, 0), (3, 1)), (2, 3), 2),
        (((2, 3, 0), (3, 1)), (3,), 0),
        (((0,), (1,), (2,)), (), 3),
    ],
)
def test_bad_words_forbid_the_id_that_would_complete_them(
    words: tuple[tuple[int, ...], ...], output: tuple[int, ...], winner: int
) -> None:
    """The prompt is no part of them."""
    params = SamplingParams(temperature=0, bad_words=words)
    row = SampleRow(params, prompt_ids=(2, 3), output_ids=output)
    assert adjusted_winner([4.0, 3.0, 2.0, 1.0], row) == winner
    tail = SampleRow(params, output_ids=output[max(0, len(output) - params.longest_bad_word) :])
    assert adjusted_winner([4.0, 3.0, 2.0, 1.0], tail) == winner


def test_forbidden_ids_stay_so_whatever_favours_them() -> None:
    params = SamplingParams(temperature=0, logit_bias={0: 100.0}, allowed_token_ids=(0, 2))
    assert adjusted_winner([1.0, 2.0, 0.0], SampleRow(params)) == 0
    assert adjusted_winner([1.0, 2.0, 0.0], SampleRow(params, forbidden=(0,))) == 2


def test_adjusting_leaves_the_logits_and_other_rows_as_they_are() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    before = logits.clone()
    rows = [SampleRow(SamplingParams(temperature=0), forbidden=(1,)), SampleRow(SamplingParams(temperature=0))]
    assert sample(logits, rows).tolist() == [0, 1]
    assert torch.equal(logits, before)


def test_a_kept_history_penalises_as_a_fresh_one() -> None:
    generator = torch.Generator().manual_seed(0)
    prompt, output = (torch.randint(0, 50, (60,), generator=generator).tolist() for _ in range(2))
    params = SamplingParams(temperature=0, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.4)
    history = TokenHistory(prompt)
    for step in range(len(output)):
        logits = torch.randn(1, 50, generator=generator)
        fresh, kept = SampleRow(params, 0, step, prompt, output[:step]), SampleRow(params, 0, step, history=history)
        assert sample(logits, [fresh]).tolist() == sample(logits, [kept]).tolist()
        history.extend([output[step]])
    assert dict(zip(history.ids, history.counts, strict=True)) == {id: output.count(id) for id in {*prompt, *output}}
    assert history.num_outputs == len(output)


def test_an_empty_bad_word_is_refused() -> None:
    with pytest.raises(ValueError, match="bad_words"):
        SamplingParams(bad_words=((1,), ()))
