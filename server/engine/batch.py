"""From scheduled windows to flat tensors: what one forward of the model needs, and where its results belong.

Decoding sequences come first, so that they are one padded group; every prompt window is a group of its own.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lrt_core.paged import DecodeGroup, NativeKV, PagedKV, PagedPool, WindowGroup
from server.engine.scheduler import ScheduledWindow


@dataclass(frozen=True)
class Batch:
    """One step, flat. tokens, positions, slots and memory_rows are int64 [T]; window i owns rows offsets[i]..offsets[i+1]."""

    windows: list[ScheduledWindow]
    offsets: list[int]
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    memory_rows: Tensor
    kv: PagedKV | NativeKV


def build(windows: Sequence[ScheduledWindow], pool: PagedPool, block_size: int, native: bool = False) -> Batch:
    """Lay out the step's windows over the pool, for native code or for torch."""
    ordered = sorted(windows, key=lambda window: window.num_tokens > 1)
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    memory_rows: list[int] = []
    offsets = [0]
    for window in ordered:
        sequence, start = window.sequence, window.start
        if window.num_tokens == 1:  # most windows are, so they are not made of lists
            tokens.append(sequence.token_ids[start])
            positions.append(start)
            slots.append(_slot(sequence.block_table, start, block_size))
            memory_rows.append(_slot(sequence.block_table, start - 1, block_size) if start else pool.zero_row)
        else:
            end = start + window.num_tokens
            tokens += sequence.token_ids[start:end]
            positions += range(start, end)
            own = slots_of(sequence.block_table, start, end, block_size)
            slots += own
            memory_rows += _memory_rows(window, own, pool.zero_row, block_size)
        offsets.append(len(tokens))
    device = pool.keys.device
    flat = torch.tensor([tokens, positions, slots, memory_rows], device=device)
    kv: PagedKV | NativeKV
    if native:
        kv = _native_kv(ordered, offsets, flat[2], pool, block_size)
    else:
        kv = PagedKV(pool, flat[2], *_groups(ordered, offsets, block_size, device))
    return Batch(ordered, offsets, flat[0], flat[1], flat[2], flat[3], kv)


def _native_kv(windows: list[ScheduledWindow], offsets: list[int], slots: Tensor, pool: PagedPool, block_size: int) -> NativeKV:
    tables, starts, context_lens = array("i"), array("i"), array("i")
    for window in windows:
        starts.append(len(tables))
        tables.extend(window.sequence.block_table)
        context_lens.append(window.start + window.num_tokens)
    parts = (np.frombuffer(part, dtype=np.int32) for part in (array("i", offsets), context_lens, starts, tables))
    return NativeKV(pool, block_size, slots, *parts)


def settled_part(batch: Batch, num_settled: Sequence[int]) -> tuple[Tensor, list[int], PagedKV | NativeKV]:
    """The leading num_settled[i] rows of every window i: their rows in the batch [R], the windows' offsets among them, and the
    pool as they see it."""
    if isinstance(batch.kv, NativeKV):
        return _native_settled_part(batch, batch.kv, num_settled)
    rows: list[int] = []
    offsets = [0]
    groups = []
    num_decodes = len(batch.windows) - len(batch.kv.windows)
    for index, (start, count) in enumerate(zip(batch.offsets, num_settled, strict=False)):
        rows += range(start, start + count)
        if index >= num_decodes:
            group = batch.kv.windows[index - num_decodes]
            context = len(group.slots) - group.num_tokens + count
            groups.append(WindowGroup(offsets[-1], count, group.slots[:context]))
        offsets.append(len(rows))
    index_of_rows = torch.tensor(rows, device=batch.slots.device)
    kv = PagedKV(batch.kv.pool, batch.slots.index_select(0, index_of_rows), batch.kv.decodes, groups)
    return index_of_rows, offsets, kv


def _native_settled_part(batch: Batch, kv: NativeKV, num_settled: Sequence[int]) -> tuple[Tensor, list[int], NativeKV]:
    starts = zip(batch.offsets, num_settled, strict=False)
    rows = torch.tensor([row for start, count in starts for row in range(start, start + count)])
    return rows, [0, *itertools.accumulate(num_settled)], kv.leading(rows, num_settled)


def slots_of(block_table: list[int], start: int, end: int, block_size: int) -> list[int]:
    """Pool slots of positions start..end - 1."""
    return [_slot(block_table, position, block_size) for position in range(start, end)]


def _slot(block_table: list[int], position: int, block_size: int) -> int:
    return block_table[position // block_size] * block_size + position % block_size


def _memory_rows(window: ScheduledWindow, slots: list[int], zero_row: int, block_size: int) -> list[int]:
    """Latent row of each position's predecessor, where one has been computed since the sequence was placed."""
    sequence, start = window.sequence, window.start
    before = [_slot(sequence.block_table, start - 1, block_size) if start else zero_row]
    rows = before + slots[:-1]
    num_known = sequence.num_touched_tokens - start + 1
    return rows if num_known >= len(rows) else rows[: max(num_known, 1)] + [zero_row] * (len(rows) - max(num_known, 1))


def _groups(
    windows: list[ScheduledWindow], offsets: list[int], block_size: int, device: torch.device
) -> tuple[DecodeGroup | None, list[WindowGroup]]:
    num_decodes = sum(window.num_tokens == 1 for window in windows)
    decodes = _decode_group(windows[:num_decodes], block_size, device) if num_decodes else None
    groups = []
    for window, offset in zip(windows[num_decodes:], offsets[num_decodes:-1], strict=True):
        context = slots_of(window.sequence.block_table, 0, window.start + window.num_tokens, block_size)
        groups.append(WindowGroup(offset, window.num_tokens, torch.tensor(context, device=device)))
    return decodes, groups


def _decode_group(windows: list[ScheduledWindow], block_size: int, device: torch.device) -> DecodeGroup:
    context_lens = [window.start + 1 for window in windows]
    num_blocks = -(-max(context_lens) // block_size)
    tables = [(window.sequence.block_table + [0] * num_blocks)[:num_blocks] for window in windows]
    blocks = torch.tensor(tables, device=device)
    slots = (blocks.unsqueeze(-1) * block_size + torch.arange(block_size, device=device)).flatten(1)
    return DecodeGroup(slots[:, : max(context_lens)].contiguous(), torch.tensor(context_lens, device=device))
