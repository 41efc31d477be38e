"""Bits per byte: the arithmetic, the merge, and sequential against the token-by-token oracle."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lrt_core.generate import read
from tests.helpers import VARIANTS, tiny_config, tiny_model
from training.evaluate import bits_per_byte, merge, parallel_bpb, sequential_bpb
from training.schedules.baseline import baseline
from training.schedules.interleaved import interleaved
from training.schedules.losses import PassLosses


def make_rows(vocab_size: int, count: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(1))


def test_special_tokens_count_neither() -> None:
    losses, targets = torch.tensor([[1.0, 2.0, 100.0]]), torch.tensor([[0, 1, 2]])
    assert bits_per_byte(losses, targets, torch.tensor([1, 3, 0])) == pytest.approx(3.0 / (math.log(2) * 4))


def test_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="only special tokens"):
        bits_per_byte(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.tensor([0]))


def test_the_last_forward_of_a_position_counts() -> None:
    passes = [
        PassLosses(torch.arange(4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])),
        PassLosses(torch.tensor([0, 2]), torch.tensor([[5.0, 6.0]])),
        PassLosses(torch.tensor([2]), torch.tensor([[7.0]])),
    ]
    assert merge(passes).tolist() == [[5.0, 2.0, 7.0, 4.0]]
    assert passes[0].token_losses.tolist() == [[1.0, 2.0, 3.0, 4.0]]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_sequential_is_the_oracle(variant: str) -> None:
    """Rows beyond one batch, and bytes per token that differ."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    rows = make_rows(model.config.vocab_size)
    byte_lengths = torch.arange(model.config.vocab_size) % 4
    losses = torch.stack([F.cross_entropy(read(model, row[:-1].tolist()).logits, row[1:], reduction="none") for row in rows])
    expected = bits_per_byte(losses, rows[:, 1:], byte_lengths)
    assert sequential_bpb(model, rows, byte_lengths, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_a_plain_model_reads_alike_both_ways() -> None:
    model = tiny_model(tiny_config(recurrence=None))
    rows, byte_lengths = make_rows(model.config.vocab_size), torch.ones(model.config.vocab_size, dtype=torch.long)
    parallel = parallel_bpb(model, baseline, rows, byte_lengths, batch_size=2)
    assert parallel.passes == pytest.approx([parallel.merged])
    assert parallel.merged == pytest.approx(sequential_bpb(model, rows, byte_lengths), rel=1e-5)


def test_parallel_passes_and_merge() -> None:
    """With S = 2 the merge is exactly the two subsets' forwards, weighted by their bytes."""
    model = tiny_model()
    rows, byte_lengths = make_rows(model.config.vocab_size), torch.ones(model.config.vocab_size, dtype=torch.long)
    result = parallel_bpb(model, partial(interleaved, num_subsets=2), rows, byte_lengths, batch_size=2)
    assert len(result.passes) == 3
    assert result.merged == pytest.approx((result.passes[1] + result.passes[2]) / 2)
    assert result.passes[0] != pytest.approx(result.merged, rel=1e-6)


def test_one_subset_per_position_is_sequential() -> None:
    """With as many subsets as positions each forward reads settled memories and keys: training's merge is serving's BPB."""
    model = tiny_model()
    rows, byte_lengths = make_rows(model.config.vocab_size), torch.ones(model.config.vocab_size, dtype=torch.long)
    result = parallel_bpb(model, partial(interleaved, num_subsets=10), rows, byte_lengths)
    assert result.merged == pytest.approx(sequential_bpb(model, rows, byte_lengths), rel=1e-5)
