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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrt_core.model import LatentRecurrentTransformer
from lrt_core.paged import DecodeGroup, PagedKV, PagedPool, WindowGroup
from lrt_core.refine import relative_change
from lrt_core.window import num_settled

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PagedStep:
    """What one forward computes, sequences of one row first.

    rows int64 [4, T]: tokens, positions, slots that take them in, and the pool's latent rows that are their memories. Sequence
    s owns rows row_starts[s]..row_starts[s + 1] (int32 [S + 1]), whose positions follow each other, and its blocks of
    block_size slots are tables[table_starts[s]...] (int32).
    """

    rows: npt.NDArray[np.int64]
    row_starts: Numbers
    table_starts: Numbers
    tables: Numbers
    block_size: int

    @property
    def num_rows(self) -> int:
        """T."""
        return int(self.rows.shape[1])

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.table_starts)


@dataclass(frozen=True)
class StepResult:
    """What a step left, sequence by sequence. hidden float32 [R, D]: hidden states of the settled rows, in order.

    num_settled: leading rows that are final. residuals: the largest relative change of a memory, None for a plain model or a
    single row. is_finite: whether the states of all settled rows are numbers; a model may overflow.
    """

    num_settled: list[int]
    residuals: list[float | None]
    is_finite: list[bool]
    hidden: Tensor

    @property
    def offsets(self) -> list[int]:
        """Where each sequence's rows begin in `hidden`, and the end."""
        return [0, *itertools.accumulate(self.num_settled)]


@torch.inference_mode()
def run_step(model: LatentRecurrentTransformer, step: PagedStep, pool: PagedPool, tolerance: float) -> StepResult:
    """Compute the step by torch. tolerance: relative change up to which a memory has settled."""
    tokens, positions, slots, memory_rows = torch.from_numpy(step.rows).to(pool.keys.device)
    kv = PagedKV(pool, slots, *_groups(step, pool.keys.device))
    memory = pool.load_memory(memory_rows) if model.config.recurrence is not None else None
    stream = model.begin(tokens, positions, memory)
    latents = model.run_to_source(stream, kv)
    pool.store_latents(slots, latents)
    counts, residuals = _settle(step, latents, memory, tolerance)
    if sum(counts) == step.num_rows:
        settled, hidden = latents, model.run_from_source(stream, latents, kv)
    else:
        rows, kv = _settled_part(step, kv, counts)
        settled = hidden = latents.index_select(0, rows)
        if not model.config.latents_are_hidden:
            hidden = model.run_from_source(stream.select(rows), settled, kv)
    return StepResult(counts, residuals, _are_finite(counts, settled, hidden), hidden)


def _groups(step: PagedStep, device: torch.device) -> tuple[DecodeGroup | None, list[WindowGroup]]:
    """How the step's sequences attend: those of one row padded beside each other, each window by itself."""
    widths, ends = np.diff(step.row_starts), step.rows[1, step.row_starts[1:] - 1] + 1
    num_decodes, offsets = int((widths == 1).sum()), np.arange(step.block_size)
    decodes, windows = None, []
    if num_decodes:
        # What is behind a sequence's end is its last slot again: another's may hold what is no number.
        last = ends[:num_decodes, None] - 1
        blocks, within = np.divmod(np.minimum(np.arange(int(last.max()) + 1), last), step.block_size)
        slots = step.tables[step.table_starts[:num_decodes, None] + blocks].astype(np.int64) * step.block_size + within
        decodes = DecodeGroup(torch.from_numpy(slots).to(device), torch.from_numpy(ends[:num_decodes]).to(device))
    for index in range(num_decodes, step.num_sequences):
        start, end = int(step.table_starts[index]), int(ends[index])
        blocks = step.tables[start : start - (-end // step.block_size)].astype(np.int64)
        context = (blocks[:, None] * step.block_size + offsets).reshape(-1)[:end]
        slots_on_device = torch.from_numpy(context).to(device)
        windows.append(WindowGroup(int(step.row_starts[index]), int(widths[index]), slots_on_device))
    return decodes, windows


def _settle(step: PagedStep, latents: Tensor, memory: Tensor | None, tolerance: float) -> tuple[list[int], list[float | None]]:
    """Settled counts and residuals: all rows for a plain model and for windows of one, by the changes otherwise."""
    widths = np.diff(step.row_starts).tolist()
    if memory is None or max(widths) == 1:
        return widths, [None] * len(widths)
    changes: list[float] = relative_change(latents[:-1], memory[1:]).tolist()
    own = [changes[start : start + width - 1] for start, width in zip(step.row_starts.tolist(), widths, strict=False)]
    return [num_settled(part, tolerance) for part in own], [max(part) if part else None for part in own]


def _settled_part(step: PagedStep, kv: PagedKV, counts: list[int]) -> tuple[Tensor, PagedKV]:
    """The leading counts[s] rows of every sequence: their rows in the step [R], and the pool as they see it."""
    rows: list[int] = []
    groups = []
    num_decodes = step.num_sequences - len(kv.windows)
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
