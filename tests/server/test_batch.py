"""Hand-made windows and the step that they make."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from lrt_core.grammar import GrammarCompiler, GrammarSource
from lrt_core.sampling_params import SamplingParams
from lrt_core.step import Layout, PagedStep
from server.engine.batch import build
from server.engine.scheduler import ScheduledWindow
from server.engine.sequence import Sequence
from tests.engines import request
from tests.helpers import tiny_tokenizer

BLOCK_SIZE = 4
NONE = 40
"""Latent row of what has no memory."""


def sequence(first_id: int, num_tokens: int, block_table: list[int], computed: int = 0, touched: int = 0) -> Sequence:
    """Ids first_id, first_id + 1, ..., placed in the given blocks."""
    made = Sequence(request(range(first_id, first_id + num_tokens)), 0, 0)
    made.block_table = array("i", block_table)
    made.num_computed_tokens, made.num_touched_tokens = computed, max(touched, computed)
    return made


def order(*windows: tuple[Sequence, int], draws: bool = False) -> tuple[list[Sequence], PagedStep]:
    """Each sequence with so many tokens from its first unsettled one on."""
    scheduled = [ScheduledWindow(own, own.num_computed_tokens, count) for own, count in windows]
    ordered, step = build(scheduled, BLOCK_SIZE, draws)
    return [window.sequence for window in ordered], step


def lay_out(*windows: tuple[Sequence, int]) -> Layout:
    return order(*windows)[1].lay_out(NONE)


def test_a_fresh_window_has_no_memories_yet() -> None:
    layout = lay_out((sequence(100, 9, [7, 2, 5]), 6))
    tokens, positions, slots, memory_rows = layout.rows.tolist()
    assert tokens == [100, 101, 102, 103, 104, 105]
    assert positions == [0, 1, 2, 3, 4, 5]
    assert slots == [28, 29, 30, 31, 8, 9]
    assert memory_rows == [NONE] * 6
    assert layout.row_starts.tolist() == [0, 6]
    assert layout.table_starts.tolist() == [0]
    assert layout.tables.tolist() == [7, 2, 5]


def test_a_second_pass_reads_what_the_first_wrote() -> None:
    layout = lay_out((sequence(100, 9, [7, 2, 5], computed=3, touched=6), 6))
    _, positions, slots, memory_rows = layout.rows.tolist()
    assert positions == [3, 4, 5, 6, 7, 8]
    assert slots == [31, 8, 9, 10, 11, 20]
    assert memory_rows == [30, 31, 8, 9, NONE, NONE], "positions 2 to 5 have been computed"


def test_the_first_row_always_has_its_settled_predecessor() -> None:
    assert lay_out((sequence(100, 9, [7, 2, 5], computed=4), 3)).rows[3].tolist() == [31, NONE, NONE]


def test_decoding_reads_the_last_tokens_latent_across_a_block_border() -> None:
    layout = lay_out((sequence(100, 5, [7, 2], computed=4), 1), (sequence(50, 1, [0]), 1))
    tokens, positions, slots, memory_rows = layout.rows.tolist()
    assert tokens == [104, 50]
    assert positions == [4, 0]
    assert slots == [8, 0]
    assert memory_rows == [31, NONE]
    assert (layout.row_starts.tolist(), layout.table_starts.tolist()) == ([0, 1, 2], [0, 2])
    assert layout.tables.tolist() == [7, 2, 0]


def test_windows_of_one_stand_first_and_rows_know_their_sequence() -> None:
    reading, decoding, last_row = sequence(10, 8, [1, 3]), sequence(50, 3, [4], computed=2), sequence(80, 6, [5, 6], computed=1)
    sequences, step = order((reading, 5), (decoding, 1), (last_row, 1))
    tokens, positions, slots, memory_rows = step.lay_out(NONE).rows.tolist()
    assert sequences == [decoding, last_row, reading]
    assert (step.num_rows, step.num_sequences) == (7, 3)
    assert step.lay_out(NONE).row_starts.tolist() == [0, 1, 2, 7]
    assert tokens == [52, 81, 10, 11, 12, 13, 14]
    assert positions == [2, 1, 0, 1, 2, 3, 4]
    assert slots == [18, 21, 4, 5, 6, 7, 12]
    assert memory_rows == [17, 20, NONE, NONE, NONE, NONE, NONE]
    assert step.tables.tolist() == [4, 5, 6, 1, 3]


def test_a_step_knows_when_the_next_token_is_due() -> None:
    """With the last known token's row; never for a sequence that is as long as it may be."""
    decoding, reading = sequence(50, 3, [4], computed=2), sequence(10, 8, [1, 3], computed=1)
    decoding.token_ids += [1, 2]
    decoding.num_computed_tokens = decoding.num_touched_tokens = 4
    read_only = Sequence(request(range(4), max_tokens=0), 0, 0)
    read_only.block_table = array("i", [2])
    _, step = order((decoding, 1), (reading, 5), (read_only, 4))
    assert [step.sequences[6 * s + 4 : 6 * s + 6].tolist() for s in range(3)] == [[1, 2], [7, 0], [0, 0]]


def test_draws_are_packed_where_every_sequence_takes_logits_as_they_are() -> None:
    plain, other = sequence(50, 3, [4], computed=2), sequence(50, 3, [5], computed=2)
    _, step = order((plain, 1), (other, 1), draws=True)
    assert step.draws is not None
    assert bytes(step.draws) == plain.request.sampling.pack(plain.seed) + other.request.sampling.pack(other.seed)
    assert order((plain, 1), (other, 1))[1].draws is None
    other.siblings = [sequence(50, 3, [])]
    assert order((plain, 1), (other, 1), draws=True)[1].draws is None, "several are drawn from one row"


@pytest.mark.parametrize(
    "overrides",
    [
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": (1, 2)},
        {"bad_words": ((1, 2),)},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_what_needs_logits_is_not_packed(overrides: dict[str, object]) -> None:
    assert Sequence(request(range(3), **overrides), 0, 0).draw is None


def test_nor_is_what_the_end_of_a_sample_or_a_grammar_forbids() -> None:
    plain = request(range(3))
    late = replace(plain, stopping=replace(plain.stopping, min_tokens=1))
    bound = replace(plain, grammar=GrammarCompiler(tiny_tokenizer(), ()).compile(GrammarSource("regex", "a+")))
    assert [Sequence(item, 0, 0).draw is None for item in (plain, late, bound)] == [False, True, True]


def test_a_seed_of_any_size_is_packed() -> None:
    for seed in (0, -1, 2**63 + 5, 2**64 + 7, -(2**70)):
        assert len(SamplingParams(seed=seed).pack(seed)) == 40
