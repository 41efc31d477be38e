"""Blocks are handed out once, counted and given back, whatever the order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.block_manager import BlockManager
from server.engine.sequence import Sequence
from tests.engines import request


def new_sequence(num_tokens: int = 4) -> Sequence:
    return Sequence(request([1] * num_tokens), 0, 0)


def resized(sequence: Sequence, num_tokens: int) -> Sequence:
    """The same sequence, now of so many known tokens."""
    sequence.token_ids = [1] * num_tokens
    return sequence


def test_growing_takes_just_enough() -> None:
    blocks, sequence = BlockManager(5, block_size=4), new_sequence()
    for num_tokens, expected in ((1, 1), (4, 1), (5, 2), (5, 2), (3, 2), (17, 5)):
        assert blocks.grow(resized(sequence, num_tokens))
        assert len(sequence.block_table) == expected
    assert sorted(sequence.block_table) == [0, 1, 2, 3, 4]
    assert blocks.num_free_blocks == 0
    assert blocks.usage == 1.0


def test_a_full_pool_says_so_before() -> None:
    blocks, first, second = BlockManager(3, block_size=4), new_sequence(8), new_sequence()
    blocks.grow(first)
    assert not blocks.grow(resized(second, 5))
    assert not blocks.can_place(second, [], reserve=0)
    assert (len(second.block_table), blocks.num_free_blocks) == (0, 1), "a failed attempt changes nothing"
    assert blocks.can_place(resized(second, 4), [], reserve=0)
    assert not blocks.can_place(second, [], reserve=1)
    assert blocks.grow(second)
    assert not blocks.grow(resized(first, 12))
    blocks.free(second)
    assert blocks.grow(first)


def test_freeing_returns_all() -> None:
    blocks, sequence = BlockManager(4, block_size=2), new_sequence(7)
    blocks.grow(sequence)
    blocks.free(sequence)
    assert not sequence.block_table
    assert blocks.num_free_blocks == 4
    assert blocks.usage == 0.0
    blocks.free(sequence)
    blocks.check_invariants([sequence])


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    blocks, first, second = BlockManager(3, block_size=2), new_sequence(), new_sequence()
    blocks.grow(first)
    for sequence in (first, second):
        sequence.place(4, window=1)
    blocks.fork(first, second)
    assert second.block_table == first.block_table
    assert blocks.num_free_blocks == 1
    blocks.check_invariants([first, second])
    blocks.free(first)
    assert blocks.num_free_blocks == 1
    blocks.check_invariants([second])
    blocks.free(second)
    assert blocks.num_free_blocks == 3


@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(1, 40)), max_size=60),
)
def test_any_order_keeps_the_books(num_blocks: int, block_size: int, operations: list[tuple[int, bool, int]]) -> None:
    blocks = BlockManager(num_blocks, block_size)
    sequences = [new_sequence() for _ in range(5)]
    for index, frees, num_tokens in operations:
        sequence = sequences[index]
        if frees:
            blocks.free(sequence)
        elif blocks.grow(resized(sequence, num_tokens)):
            assert len(sequence.block_table) * block_size >= num_tokens
        blocks.check_invariants(sequences)
        assert blocks.num_free_blocks == num_blocks - sum(len(s.block_table) for s in sequences)


def test_the_check_finds_what_is_wrong() -> None:
    blocks, sequence, stray = BlockManager(3, block_size=2), new_sequence(), new_sequence()
    blocks.grow(sequence)
    with pytest.raises(AssertionError, match="block"):
        blocks.check_invariants([])
    stray.block_table = sequence.block_table[:1]
    with pytest.raises(AssertionError, match="block"):
        blocks.check_invariants([sequence, stray])
