"""One step of many sequences over the paged pool: its rows, what comes of it, and how torch computes it.

Every sequence has a window of rows, one where it decodes. Memories come out of the pool, the layers run up to the source,
latents go into the pool, and what enters a row a second time unchanged has settled; the layers above the source run on settled
rows alone, since the others will be computed again and nothing depends on what these layers make of them until then.
Neighbours: `native_model.py` computes the same in one native call, `paged.py` has the pool, `window.py` the settling rule; the
server's batch builder makes steps.

Shapes: T rows of the step (all sequences flat), R settled rows, S sequences, D hidden size.
"""

from __future__ import annotations

import itertools
import math
from array import array
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrt_core.model import LatentRecurrentTransformer
from lrt_core.paged import DecodeGroup, PagedKV, PagedPool, WindowGroup
from lrt_core.refine import relative_change
from lrt_core.window import num_settled

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PagedStep:
    """What one forward computes, sequences of one row first.

    tokens [T], of 64 bits. sequences: six numbers each, of 64 bits: the position of its first row; its rows; the leading
    positions whose latents the pool holds; its blocks; the settled rows with which its next token is due, 0 where none will
    be; and the tokens drawn before. tables: everyone's blocks, of 32 bits, one sequence's behind another's. draws: where the
    native step is to draw the tokens that are due, every sequence's `SamplingParams.pack`.
    """

    tokens: array[int]
    sequences: array[int]
    tables: array[int]
    block_size: int
    draws: bytearray | None = None

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.sequences) // 6

    def lay_out(self, zero_row: int) -> Layout:
        """Every row's place. zero_row: latent row of what has no memory yet."""
        starts, widths, touched, num_blocks = np.array(self.sequences).reshape(-1, 6).T[:4]
        row_starts, table_starts = (np.concatenate([[0], np.cumsum(part)]) for part in (widths, num_blocks))
        owners = np.repeat(np.arange(len(starts)), widths)
        positions = starts[owners] + np.arange(self.num_rows) - row_starts[owners]
        tables = np.array(self.tables, dtype=np.int64)
        slots, memory_rows = (
            tables[table_starts[owners] + places // self.block_size] * self.block_size + places % self.block_size
            for places in (positions, np.maximum(positions - 1, 0))
        )
        # A predecessor's latent is there where it has been computed since the sequence was placed.
        memory_rows[(positions == 0) | (positions > touched[owners])] = zero_row
        rows = np.stack([np.array(self.tokens), positions, slots, memory_rows])
        return Layout(rows, row_starts, table_starts[:-1], tables, self.block_size)


class Layout(NamedTuple):
    """rows int64 [4, T]: tokens, positions, slots that take them in, and the pool's latent rows that are their memories.
    Sequence s owns rows row_starts[s]..row_starts[s + 1], and its blocks are tables[table_starts[s]...]."""

    rows: Numbers
    row_starts: Numbers
    table_starts: Numbers
    tables: Numbers
    block_size: int


@dataclass(frozen=True)
class StepResult:
    """What a step left, sequence by sequence. hidden float32 [R, D]: hidden states of the settled rows, in order.

    num_settled: leading rows that are final. residuals: the largest relative change of a memory, None for a plain model or a
    single row. is_finite: whether the states of all settled rows are numbers; a model may overflow. ids: tokens that the step
    has drawn, negative where none was due; None where it draws none.
    """

    num_settled: list[int]
    residuals: list[float | None]
    is_finite: list[bool]
    hidden: Tensor
    ids: list[int] | None = None

    @property
    def offsets(self) -> list[int]:
        """Where each sequence's rows begin in `hidden`, and the end."""
        return [0, *itertools.accumulate(self.num_settled)]


@torch.inference_mode()
def run_step(model: LatentRecurrentTransformer, step: PagedStep, pool: PagedPool, tolerance: float) -> StepResult:
    """Compute the step by torch, which draws no tokens. tolerance: relative change up to which a memory has settled."""
    assert step.draws is None, "only the native step draws"
    layout = step.lay_out(pool.zero_row)
    tokens, positions, slots, memory_rows = torch.from_numpy(layout.rows).to(pool.keys.device)
    kv = PagedKV(pool, slots, *_groups(layout, pool.keys.device))
    memory = pool.load_memory(memory_rows) if model.config.recurrence is not None else None
    stream = model.begin(tokens, positions, memory)
    latents = model.run_to_source(stream, kv)
    pool.store_latents(slots, latents)
    counts, residuals = _settle(layout, latents, memory, tolerance)
    if sum(counts) == step.num_rows:
        settled, hidden = latents, model.run_from_source(stream, latents, kv)
    else:
        rows, kv = _settled_part(layout, kv, counts)
        settled = hidden = latents.index_select(0, rows)
        if not model.config.latents_are_hidden:
            hidden = model.run_from_source(stream.select(rows), settled, kv)
    return StepResult(counts, residuals, _are_finite(counts, settled, hidden), hidden)


def _groups(step: Layout, device: torch.device) -> tuple[DecodeGroup | None, list[WindowGroup]]:
    """How the step's sequences attend: those of one row padded beside each other, each window by itself."""
    widths, ends = np.diff(step.row_starts), step.rows[1, step.row_starts[1:] - 1] + 1
    num_decodes, offsets = int((widths == 1).sum()), np.arange(step.block_size)
    decodes, windows = None, []
    if num_decodes:
        # What is behind a sequence's end is its last slot again: another's may hold what is no number.
        last = ends[:num_decodes, None] - 1
        blocks, within = np.divmod(np.minimum(np.arange(int(last.max()) + 1), last), step.block_size)
        slots = step.tables[step.table_starts[:num_decodes, None] + blocks] * step.block_size + within
        decodes = DecodeGroup(torch.from_numpy(slots).to(device), torch.from_numpy(ends[:num_decodes]).to(device))
    for index in range(num_decodes, len(widths)):
        start, end = int(step.table_starts[index]), int(ends[index])
        blocks = step.tables[start : start - (-end // step.block_size)]
        context = (blocks[:, None] * step.block_size + offsets).reshape(-1)[:end]
        slots_on_device = torch.from_numpy(context).to(device)
        windows.append(WindowGroup(int(step.row_starts[index]), int(widths[index]), slots_on_device))
    return decodes, windows


def _settle(step: Layout, latents: Tensor, memory: Tensor | None, tolerance: float) -> tuple[list[int], list[float | None]]:
    """Settled counts and residuals: all rows for a plain model and for windows of one, by the changes otherwise."""
    widths = np.diff(step.row_starts).tolist()
    if memory is None or max(widths) == 1:
        return widths, [None] * len(widths)
    changes: list[float] = relative_change(latents[:-1], memory[1:]).tolist()
    own = [changes[start : start + width - 1] for start, width in zip(step.row_starts.tolist(), widths, strict=False)]
    return [num_settled(part, tolerance) for part in own], [_largest(part) if part else None for part in own]


def _largest(changes: list[float]) -> float:
    """No number if any is none."""
    return math.nan if any(math.isnan(change) for change in changes) else max(changes)


def _settled_part(step: Layout, kv: PagedKV, counts: list[int]) -> tuple[Tensor, PagedKV]:
    """The leading counts[s] rows of every sequence: their rows in the step [R], and the pool as they see it."""
    rows: list[int] = []
    groups = []
    num_decodes = len(step.table_starts) - len(kv.windows)
    for index, (start, count) in enumerate(zip(step.row_starts.tolist(), counts, strict=False)):
        if index >= num_decodes:
            group = kv.windows[index - num_decodes]
            context = len(group.slots) - group.num_tokens + count
            groups.append(WindowGroup(len(rows), count, group.slots[:context]))
        rows += range(start, start + count)
    chosen = torch.tensor(rows, device=kv.slot_mapping.device)
    return chosen, PagedKV(kv.pool, kv.slot_mapping.index_select(0, chosen), kv.decodes, groups)


def _are_finite(counts: list[int], *states: Tensor) -> list[bool]:
    """Whose settled rows of states [R, D] are numbers."""
    sums = [part.float().sum(-1).isfinite() for part in states]
    if all(bool(part.all()) for part in sums):
        return [True] * len(counts)
    ends = list(itertools.accumulate(counts))
    return [all(bool(part[end - count : end].all()) for part in sums) for count, end in zip(counts, ends, strict=True)]
