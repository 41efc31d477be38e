"""Text as it becomes certain: stop strings across token borders, never leaked, never held longer than needed."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.engine.detokenizer import Detokenizer
from tests.helpers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
Emitted = list[tuple[str, str | None]]


def feed(ids: list[int], stop: tuple[str, ...], min_tokens: int = 0, include_stop: bool = False) -> Emitted:
    """What each id gives until one ends the sample, then what the end gives."""
    detokenizer, out = Detokenizer(TOKENIZER, stop, min_tokens, include_stop), []
    for token in ids:
        out.append(detokenizer.add(token))
        if out[-1][1] is not None:
            return out
    return [*out, detokenizer.finish()]


def expected(ids: list[int], stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The whole text up to the first token with which it contains a stop string."""
    for count in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:count])
        if count < len(ids):
            text = text.rstrip("\ufffd")  # half a character
        found = [(text.index(s), -len(s), s) for s in stop if s in text]
        if found:
            return text[: min(found)[0]], min(found)[2]
    return TOKENIZER.decode(ids), None


@given(
    st.text(alphabet="ab é€", max_size=20),
    st.lists(st.text(alphabet="ab é€", min_size=1, max_size=4), max_size=3).map(tuple),
)
@example("aab", ("ab",))
@example("ababac", ("abac",))
@example("€ab", ("b", "€ab"))
def test_any_text_and_stop_strings(text: str, stop: tuple[str, ...]) -> None:
    """Bytes as tokens: every border falls somewhere, within characters too."""
    ids = list(text.encode())
    out = feed(ids, stop)
    assert ("".join(piece for piece, _ in out), out[-1][1]) == expected(ids, stop)
    assert all(found is None for _, found in out[:-1])


@given(st.text(alphabet="abc", max_size=15), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3).map(tuple))
def test_no_more_is_held_than_could_begin_a_stop_string(text: str, stop: tuple[str, ...]) -> None:
    detokenizer, sent = Detokenizer(TOKENIZER, stop), ""
    for count, token in enumerate(text.encode(), start=1):
        piece, found = detokenizer.add(token)
        sent += piece
        if found is not None:
            return
        held = text[len(sent) : count]
        assert sent + held == text[:count]
        assert held == "" or any(s.startswith(held) for s in stop)


def test_pieces_one_by_one() -> None:
    out = feed(list(b"xSTy STOPz"), ("STOP",))
    assert [piece for piece, _ in out] == ["x", "", "", "STy", " ", "", "", "", ""]
    assert out[-1] == ("", "STOP")


def test_several_characters_a_token() -> None:
    ids = TOKENIZER.encode("there in the end", add_bos=False)
    assert len(ids) < 16
    out = feed(ids, ("n th",))
    assert "".join(piece for piece, _ in out) == "there i"
    assert out[-1][1] == "n th"


def test_the_first_match_wins_and_of_two_there_the_longer() -> None:
    th = TOKENIZER.encode("th", add_bos=False)
    assert len(th) == 1
    assert feed(th, ("h", "th", "t")) == [("", "th")]


def test_held_text_comes_out_at_the_end() -> None:
    assert feed(list(b"abc"), ("bcd",)) == [("a", None), ("", None), ("", None), ("bc", None)]


def test_a_stop_string_may_be_longer_than_the_text() -> None:
    assert "".join(piece for piece, _ in feed(list(b"aaaa"), ("a" * 1000,))) == "aaaa"


def test_an_incomplete_character_at_the_end_can_complete_a_stop_string() -> None:
    ids = [ord("a"), "é".encode()[0]]
    assert feed(ids, ()) == [("a", None), ("", None), ("\ufffd", None)]
    assert feed(ids, ("\ufffd",)) == [("a", None), ("", None), ("", "\ufffd")]


@pytest.mark.parametrize("stop", [(), ("<|bos|>",)])
def test_special_tokens_have_no_text_to_match(stop: tuple[str, ...]) -> None:
    assert TOKENIZER.bos_id is not None
    assert feed([ord("a"), TOKENIZER.bos_id], stop) == [("a", None), ("", None), ("", None)]


@given(
    st.text(alphabet="ab", max_size=15),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
    st.integers(0, 8),
)
@example("aab", ("ab", "a"), 2)
def test_stop_strings_end_nothing_before_min_tokens(text: str, stop: tuple[str, ...], min_tokens: int) -> None:
    """A byte is a token: the first that ends with a stop string and is not too early."""
    ends = [count for count in range(1, len(text) + 1) if text[:count].endswith(stop)]
    end = next((count for count in ends if count >= min_tokens), None)
    out = feed(list(text.encode()), stop, min_tokens)
    kept = feed(list(text.encode()), stop, min_tokens, include_stop=True)
    if end is None:
        assert "".join(piece for piece, _ in out) == "".join(piece for piece, _ in kept) == text
        assert out[-1][1] is None
    else:
        longest = max((s for s in stop if text[:end].endswith(s)), key=len)
        assert ("".join(piece for piece, _ in out), out[-1][1]) == (text[: end - len(longest)], longest)
        assert ("".join(piece for piece, _ in kept), kept[-1][1]) == (text[:end], longest)


def test_many_long_stop_strings() -> None:
    stop = tuple("a" * 500 + f"{number:03}" for number in range(1000))
    text = "a" * 700 + "777b"
    out = feed(list(text.encode()), stop)
    assert ("".join(piece for piece, _ in out), out[-1][1]) == ("a" * 200, "a" * 500 + "777")
