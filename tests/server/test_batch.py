"""Hand-made windows and what they look like flat."""

from __future__ import annotations

import torch

from lrt_core.paged import PagedPool
from server.engine.batch import Batch, build
from server.engine.scheduler import ScheduledWindow
from server.engine.sequence import Sequence
from tests.engines import request
from tests.helpers import tiny_config

BLOCK_SIZE = 4
POOL = PagedPool(tiny_config(), 40, torch.float32)
NONE = POOL.zero_row


def sequence(first_id: int, num_tokens: int, block_table: list[int], computed: int = 0, touched: int = 0) -> Sequence:
    """Ids first_id, first_id + 1, ..., placed in the given blocks."""
    made = Sequence(request(range(first_id, first_id + num_tokens)), 0, 0)
    made.block_table, made.num_computed_tokens, made.num_touched_tokens = block_table, computed, max(touched, computed)
    return made


def lay_out(*windows: tuple[Sequence, int]) -> Batch:
    """Each sequence with so many tokens from its first unsettled one on."""
    return build([ScheduledWindow(own, own.num_computed_tokens, count) for own, count in windows], POOL, BLOCK_SIZE)


def test_a_fresh_window_has_no_memories_yet() -> None:
    batch = lay_out((sequence(100, 9, [7, 2, 5]), 6))
    assert batch.tokens.tolist() == [100, 101, 102, 103, 104, 105]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.slots.tolist() == [28, 29, 30, 31, 8, 9]
    assert batch.memory_rows.tolist() == [NONE] * 6
    assert batch.offsets == [0, 6]
    assert batch.kv.decodes is None
    [group] = batch.kv.windows
    assert (group.start, group.num_tokens, group.slots.tolist()) == (0, 6, [28, 29, 30, 31, 8, 9])


def test_a_second_pass_reads_what_the_first_wrote() -> None:
    batch = lay_out((sequence(100, 9, [7, 2, 5], computed=3, touched=6), 6))
    assert batch.positions.tolist() == [3, 4, 5, 6, 7, 8]
    assert batch.slots.tolist() == [31, 8, 9, 10, 11, 20]
    assert batch.memory_rows.tolist() == [30, 31, 8, 9, NONE, NONE], "positions 2 to 5 have been computed"
    assert batch.kv.windows[0].slots.tolist() == [28, 29, 30, 31, 8, 9, 10, 11, 20]


def test_the_first_row_always_has_its_settled_predecessor() -> None:
    batch = lay_out((sequence(100, 9, [7, 2, 5], computed=4), 3))
    assert batch.memory_rows.tolist() == [31, NONE, NONE]


def test_decoding_reads_the_last_tokens_latent_across_a_block_border() -> None:
    batch = lay_out((sequence(100, 5, [7, 2], computed=4), 1), (sequence(50, 1, [0]), 1))
    assert batch.tokens.tolist() == [104, 50]
    assert batch.slots.tolist() == [8, 0]
    assert batch.memory_rows.tolist() == [31, NONE]
    group = batch.kv.decodes
    assert group is not None
    assert group.context_lens.tolist() == [5, 1]
    assert group.slots.shape == (2, 5)
    assert group.slots[0].tolist() == [28, 29, 30, 31, 8]
    assert group.slots[1, 0] == 0
    assert batch.kv.windows == []


def test_windows_of_one_stand_first_and_results_know_their_rows() -> None:
    reading, decoding, last_row = sequence(10, 8, [1, 3]), sequence(50, 3, [4], computed=2), sequence(80, 6, [5, 6], computed=1)
    batch = lay_out((reading, 5), (decoding, 1), (last_row, 1))
    assert [window.sequence for window in batch.windows] == [decoding, last_row, reading]
    assert batch.offsets == [0, 1, 2, 7]
    assert batch.tokens.tolist() == [52, 81, 10, 11, 12, 13, 14]
    assert batch.kv.decodes is not None
    assert batch.kv.decodes.context_lens.tolist() == [3, 2]
    assert batch.kv.windows[0].start == 2
    assert batch.kv.slot_mapping.tolist() == batch.slots.tolist()
