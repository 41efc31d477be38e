"""Ids to text as they come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lrt_core.text import TextDecoder
from tests.helpers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def decode(ids: list[int]) -> list[str]:
    """What comes out at each id, and at the end."""
    decoder = TextDecoder(TOKENIZER)
    return [*(decoder.add(token) for token in ids), decoder.finish()]


@given(st.text())
def test_pieces_add_up_to_the_text(text: str) -> None:
    assert "".join(decode(TOKENIZER.encode(text))) == text


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - len(TOKENIZER.special_tokens) - 1)))
def test_any_ids_decode_as_a_whole(ids: list[int]) -> None:
    assert "".join(decode(ids)) == TOKENIZER.decode(ids)


def test_a_character_comes_with_its_last_byte() -> None:
    assert decode(list("é€".encode())) == ["", "é", "", "", "€", ""]


def test_special_tokens_have_no_text() -> None:
    bos = TOKENIZER.bos_id
    assert bos is not None
    assert decode([bos, ord("a"), bos]) == ["", "a", "", ""]


def test_half_a_character_at_the_end_shows() -> None:
    assert decode([ord("a"), "é".encode()[0]]) == ["a", "", "\ufffd"]


def test_a_broken_character_does_not_hold_up_what_follows() -> None:
    assert "".join(decode(["é".encode()[0], ord("x")])) == "\ufffdx"
