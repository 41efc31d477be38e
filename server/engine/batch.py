"""From scheduled windows to one step's flat arrays: what one forward of the model needs.

Python touches a window once; what belongs to its tokens is made for all of them together. Sequences of one row come first, as a
step wants them. Neighbours: `scheduler.py` chooses the windows, `lrt_core/step.py` says what a step is and computes it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lrt_core.step import PagedStep
from server.engine.scheduler import ScheduledWindow


def build(windows: Sequence[ScheduledWindow], zero_row: int, block_size: int) -> tuple[list[ScheduledWindow], PagedStep]:
    """The windows in the order of the step's sequences, and the step. zero_row: latent row of what has no memory yet."""
    ordered = [window for window in windows if window.num_tokens == 1]
    num_decodes = len(ordered)
    ordered += [window for window in windows if window.num_tokens > 1]
    tokens, starts, touched = array("q"), array("q"), array("q")
    tables, table_starts, row_starts = array("i"), array("i"), array("i", (0,))
    for index, (sequence, start, num_tokens, _) in enumerate(ordered):
        if index < num_decodes:
            tokens.append(sequence.token_ids[start])
        else:
            tokens.extend(sequence.token_ids[start : start + num_tokens])
        starts.append(start)
        touched.append(sequence.num_touched_tokens)
        table_starts.append(len(tables))
        tables += sequence.block_table
        row_starts.append(len(tokens))
    first_row, first_block = _int32(row_starts), _int32(table_starts)
    positions, blocks, known = _int64(starts), first_block, _int64(touched)
    if num_decodes < len(ordered):
        owners = np.repeat(np.arange(len(ordered)), np.diff(first_row))
        positions = positions[owners] + np.arange(len(tokens)) - first_row[owners]
        blocks, known = blocks[owners], known[owners]
    rows = np.empty((4, len(tokens)), dtype=np.int64)
    rows[0], rows[1] = _int64(tokens), positions
    all_blocks = _int32(tables)
    _fill_slots(rows[2], positions, all_blocks, blocks, block_size)
    _fill_slots(rows[3], np.maximum(positions - 1, 0), all_blocks, blocks, block_size)
    # A predecessor's latent is there where it has been computed since the sequence was placed.
    rows[3][(positions == 0) | (positions > known)] = zero_row
    return ordered, PagedStep(rows, first_row, first_block, all_blocks, block_size)


def slots_of(block_table: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Pool slots of positions start..end - 1."""
    return [block_table[position // block_size] * block_size + position % block_size for position in range(start, end)]


def _fill_slots(
    out: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    tables: npt.NDArray[np.int32],
    table_starts: npt.NDArray[np.int32],
    block_size: int,
) -> None:
    """The slot of every position, whose sequence's blocks are tables[table_starts...]."""
    index, offset = np.divmod(positions, block_size)
    out[:] = tables[table_starts + index]
    out *= block_size
    out += offset


def _int64(numbers: array[int]) -> npt.NDArray[np.int64]:
    return np.frombuffer(numbers, dtype=np.int64)


def _int32(numbers: array[int]) -> npt.NDArray[np.int32]:
    return np.frombuffer(numbers, dtype=np.int32)
