"""Hand-made windows and what they look like flat."""

from __future__ import annotations

from array import array

from lrt_core.step import PagedStep
from server.engine.batch import build
from server.engine.scheduler import ScheduledWindow
from server.engine.sequence import Sequence
from tests.engines import request

BLOCK_SIZE = 4
NONE = 40
"""Latent row of what has no memory."""


def sequence(first_id: int, num_tokens: int, block_table: list[int], computed: int = 0, touched: int = 0) -> Sequence:
    """Ids first_id, first_id + 1, ..., placed in the given blocks."""
    made = Sequence(request(range(first_id, first_id + num_tokens)), 0, 0)
    made.block_table = array("i", block_table)
    made.num_computed_tokens, made.num_touched_tokens = computed, max(touched, computed)
    return made


def order(*windows: tuple[Sequence, int]) -> tuple[list[Sequence], PagedStep]:
    """Each sequence with so many tokens from its first unsettled one on."""
    scheduled = [ScheduledWindow(own, own.num_computed_tokens, count) for own, count in windows]
    ordered, step = build(scheduled, NONE, BLOCK_SIZE)
    return [window.sequence for window in ordered], step


def lay_out(*windows: tuple[Sequence, int]) -> PagedStep:
    return order(*windows)[1]


def test_a_fresh_window_has_no_memories_yet() -> None:
    step = lay_out((sequence(100, 9, [7, 2, 5]), 6))
    tokens, positions, slots, memory_rows = step.rows.tolist()
    assert tokens == [100, 101, 102, 103, 104, 105]
    assert positions == [0, 1, 2, 3, 4, 5]
    assert slots == [28, 29, 30, 31, 8, 9]
    assert memory_rows == [NONE] * 6
    assert (step.num_rows, step.num_sequences) == (6, 1)
    assert step.row_starts.tolist() == [0, 6]
    assert step.table_starts.tolist() == [0]
    assert step.tables.tolist() == [7, 2, 5]


def test_a_second_pass_reads_what_the_first_wrote() -> None:
    step = lay_out((sequence(100, 9, [7, 2, 5], computed=3, touched=6), 6))
    _, positions, slots, memory_rows = step.rows.tolist()
    assert positions == [3, 4, 5, 6, 7, 8]
    assert slots == [31, 8, 9, 10, 11, 20]
    assert memory_rows == [30, 31, 8, 9, NONE, NONE], "positions 2 to 5 have been computed"


def test_the_first_row_always_has_its_settled_predecessor() -> None:
    step = lay_out((sequence(100, 9, [7, 2, 5], computed=4), 3))
    assert step.rows[3].tolist() == [31, NONE, NONE]


def test_decoding_reads_the_last_tokens_latent_across_a_block_border() -> None:
    step = lay_out((sequence(100, 5, [7, 2], computed=4), 1), (sequence(50, 1, [0]), 1))
    tokens, positions, slots, memory_rows = step.rows.tolist()
    assert tokens == [104, 50]
    assert positions == [4, 0]
    assert slots == [8, 0]
    assert memory_rows == [31, NONE]
    assert (step.row_starts.tolist(), step.table_starts.tolist()) == ([0, 1, 2], [0, 2])
    assert step.tables.tolist() == [7, 2, 0]


def test_windows_of_one_stand_first_and_rows_know_their_sequence() -> None:
    reading, decoding, last_row = sequence(10, 8, [1, 3]), sequence(50, 3, [4], computed=2), sequence(80, 6, [5, 6], computed=1)
    sequences, step = order((reading, 5), (decoding, 1), (last_row, 1))
    tokens, positions, slots, memory_rows = step.rows.tolist()
    assert sequences == [decoding, last_row, reading]
    assert step.row_starts.tolist() == [0, 1, 2, 7]
    assert tokens == [52, 81, 10, 11, 12, 13, 14]
    assert positions == [2, 1, 0, 1, 2, 3, 4]
    assert slots == [18, 21, 4, 5, 6, 7, 12]
    assert memory_rows == [17, 20, NONE, NONE, NONE, NONE, NONE]
    assert step.tables.tolist() == [4, 5, 6, 1, 3]
