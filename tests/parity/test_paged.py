"""Whole models over the paged pool, slots scattered, against the oracle's contiguous cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrt_core.generate import ReadResult, read
from lrt_core.memory import shift
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.paged import DecodeGroup, PagedKV, PagedPool, WindowGroup
from tests.helpers import VARIANTS, random_ids, tiny_config, tiny_model

LENGTHS = [45, 5, 38]
"""Of three sequences that run side by side; two outgrow the short window of 32."""
NUM_SLOTS = 128


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> LatentRecurrentTransformer:
    return tiny_model(tiny_config(**VARIANTS[request.param]))


def scattered() -> list[Tensor]:
    """Slots of each sequence, in no order."""
    order = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(0))
    return list(order[: sum(LENGTHS)].split(LENGTHS))


def assert_equal(model: LatentRecurrentTransformer, hidden: Tensor, latents: Tensor, expected: ReadResult, rows: slice) -> None:
    torch.testing.assert_close(model.logits(hidden), expected.logits[rows], atol=2e-4, rtol=0)
    torch.testing.assert_close(latents, expected.latents[rows], atol=1e-4, rtol=0)


@torch.no_grad()
def test_decoding_side_by_side(model: LatentRecurrentTransformer) -> None:
    """Token by token from the first on, latents through the pool; a sequence that is over leaves the batch."""
    pool, slots = PagedPool(model.config, NUM_SLOTS, model.dtype), scattered()
    ids = [random_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = [read(model, own) for own in ids]
    for position in range(max(LENGTHS)):
        live = [i for i, length in enumerate(LENGTHS) if position < length]
        table = torch.stack([slots[i][: position + 1] for i in live])
        before = table[:, -2] if position else torch.full((len(live),), pool.zero_row)
        memory = pool.load_memory(before) if model.config.recurrence is not None else None
        kv = PagedKV(pool, table[:, -1], DecodeGroup(table, torch.full((len(live),), position + 1)), [])
        tokens = torch.tensor([ids[i][position] for i in live])
        hidden, latents = model(tokens, torch.full((len(live),), position), memory, kv)
        pool.store_latents(table[:, -1], latents)
        for row, i in enumerate(live):
            assert_equal(model, hidden[row : row + 1], latents[row : row + 1], expected[i], slice(position, position + 1))


@torch.no_grad()
def test_windows_side_by_side(model: LatentRecurrentTransformer) -> None:
    """Every sequence in three portions with its true memories, one of them a single token."""
    pool, slots = PagedPool(model.config, NUM_SLOTS, model.dtype), scattered()
    ids = [random_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = [read(model, own) for own in ids]
    memories = [shift(result.latents) for result in expected]
    borders = [[0, 1, 20, 45], [0, 2, 3, 5], [0, 30, 37, 38]]
    for portion in range(3):
        spans = [slice(border[portion], border[portion + 1]) for border in borders]
        order = sorted(range(3), key=lambda i: spans[i].stop - spans[i].start > 1)
        hidden, latents = forward_spans(model, pool, slots, ids, memories, [(i, spans[i]) for i in order])
        for i, rows in zip(order, split_rows([spans[i] for i in order]), strict=True):
            assert_equal(model, hidden[rows], latents[rows], expected[i], spans[i])


def split_rows(spans: list[slice]) -> list[slice]:
    """Rows of each span in the flat batch."""
    ends = torch.tensor([span.stop - span.start for span in spans]).cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def forward_spans(
    model: LatentRecurrentTransformer,
    pool: PagedPool,
    slots: list[Tensor],
    ids: list[list[int]],
    memories: list[Tensor],
    spans: list[tuple[int, slice]],
) -> tuple[Tensor, Tensor]:
    """One step over spans of sequences, those of one token first."""
    decodes = [(i, span) for i, span in spans if span.stop - span.start == 1]
    group = None
    if decodes:
        table = torch.zeros(len(decodes), max(span.stop for _, span in decodes), dtype=torch.int64)
        for row, (i, span) in enumerate(decodes):
            table[row, : span.stop] = slots[i][: span.stop]
        group = DecodeGroup(table, torch.tensor([span.stop for _, span in decodes]))
    rows = split_rows([span for _, span in spans])
    windows = [
        WindowGroup(own.start, own.stop - own.start, slots[i][: span.stop])
        for own, (i, span) in zip(rows, spans, strict=True)
        if own.stop - own.start > 1
    ]
    kv = PagedKV(pool, torch.cat([slots[i][span] for i, span in spans]), group, windows)
    tokens = torch.tensor([token for i, span in spans for token in ids[i][span]])
    positions = torch.cat([torch.arange(span.start, span.stop) for _, span in spans])
    memory = torch.cat([memories[i][span] for i, span in spans]) if model.config.recurrence is not None else None
    result = model(tokens, positions, memory, kv)
    return result.hidden, result.latents
