"""Choices from deltas: texts, ids, logprobs in the legacy shape, character offsets; chunk by chunk as merged."""

from __future__ import annotations

import math
from typing import Any

import pytest

from server.api.choices import LOWEST_LOGPROB, ChoiceWriter
from server.engine.request import Delta, TokenLogprob
from server.engine.stream import join

TOKENS = {1: b"a", 2: b"bc", 3: b"\xc3", 4: b"\xa9", 5: "\u20ac".encode(), 6: b"\xe2\x82", 7: b"\xac!", 8: b"<bos>", 9: b"\xff"}
TOKENS |= {10: b"\xe0", 11: b"\x98\x80"}


class ByteTokenizer:
    """Tokens of given bytes; 8 is special, and 3, 4, 6, 9 decode to the same replacement character alone."""

    def __init__(self) -> None:
        self.special_tokens = {"<bos>": 8}

    def token_bytes(self, id: int) -> bytes:
        return TOKENS[id]

    def decode(self, ids: list[int]) -> str:
        return b"".join(TOKENS[id] for id in ids).decode("utf-8", "replace")


def writer(prompt_ids: tuple[int, ...] = (1,), **options: Any) -> ChoiceWriter:
    return ChoiceWriter(ByteTokenizer(), 0, prompt_ids, logprobs=5, **options)  # type: ignore[arg-type]


def delta(*ids: int, text: str = "", finish: Any = None, **more: Any) -> Delta:
    return Delta(0, text, list(ids), [TokenLogprob(id, -float(id)) for id in ids], finish_reason=finish, **more)


def offsets(*ids: int, **options: Any) -> list[int]:
    return list(writer(**options).write(delta(*ids))["logprobs"]["text_offset"])


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((1, 2, 1), [0, 1, 3]),
        ((3, 4, 1), [0, 0, 1]),  # one character in two tokens
        ((1, 6, 7, 1), [0, 1, 1, 3]),  # a token ends one character and holds another
        ((5, 1), [0, 1]),
        ((3, 1, 1), [0, 1, 2]),  # an abandoned character is a replacement character of its own
        ((3, 3, 4, 1), [0, 1, 1, 2]),
        ((9, 1), [0, 1]),
        ((10, 11, 1), [0, 1, 3]),  # what begins like the rest of a character, and is not of the one before
        ((4, 11, 1), [0, 1, 3]),
        ((1, 8, 1), [0, 1, 1]),  # a special token has no text
    ],
)
def test_offsets_count_characters(ids: tuple[int, ...], expected: list[int]) -> None:
    assert offsets(*ids) == expected
    one_by_one = writer()
    assert [one_by_one.write(delta(id))["logprobs"]["text_offset"][0] for id in ids] == expected


def test_offsets_with_echo_go_on_from_the_prompt() -> None:
    prompt = [TokenLogprob(8, None), TokenLogprob(3, -1.0), TokenLogprob(4, -2.0), TokenLogprob(2, -3.0)]
    echoing = writer((8, 3, 4, 2), prompt_text="\u00e9bc", hidden=1)
    chunk = echoing.write(delta(1, text="a", prompt_logprobs=prompt))
    assert chunk["text"] == "\u00e9bca"
    assert chunk["logprobs"]["text_offset"] == [0, 0, 0, 1, 3]
    assert chunk["logprobs"]["tokens"] == ["<bos>", "\ufffd", "\ufffd", "bc", "a"]
    assert chunk["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -3.0, -1.0]
    assert chunk["logprobs"]["top_logprobs"][0] is None
    assert echoing.write(delta(1, text="a"))["logprobs"]["text_offset"] == [4]


def test_special_tokens_in_an_id_prompt_are_part_of_its_text() -> None:
    prompt = [TokenLogprob(8, None), TokenLogprob(1, -1.0)]
    chunk = writer((8, 1), prompt_text="<bos>a").write(delta(finish="length", prompt_logprobs=prompt))
    assert chunk["text"] == "<bos>a"
    assert chunk["logprobs"]["text_offset"] == [0, 5]


def top(*alternatives: tuple[int, float], own: tuple[int, float]) -> dict[str, float]:
    entry = Delta(0, "", [own[0]], [TokenLogprob(own[0], own[1], alternatives)])
    logprobs = writer().write(entry)["logprobs"]
    (found,), (logprob,) = logprobs["top_logprobs"], logprobs["token_logprobs"]
    assert logprob == max(own[1], LOWEST_LOGPROB)
    return dict(found)


def test_top_logprobs_hold_the_alternatives_and_the_token_itself() -> None:
    assert top((1, -0.1), (2, -2.0), own=(1, -0.1)) == {"a": -0.1, "bc": -2.0}
    assert list(top((1, -0.1), (2, -2.0), own=(5, -7.0)).items()) == [("a", -0.1), ("bc", -2.0), ("\u20ac", -7.0)]
    assert top(own=(2, -0.3)) == {"bc": -0.3}


def test_of_ids_with_one_text_the_larger_stays() -> None:
    assert top((3, -0.5), (4, -1.5), own=(3, -0.5)) == {"\ufffd": -0.5}
    assert top((3, -0.5), own=(9, -4.0)) == {"\ufffd": -0.5}
    assert top((4, -4.0), own=(9, -0.5)) == {"\ufffd": -0.5}


def test_minus_infinity_is_a_number_that_json_has() -> None:
    assert top((1, -0.1), (2, -math.inf), own=(5, -math.inf)) == {"a": -0.1, "bc": LOWEST_LOGPROB, "\u20ac": LOWEST_LOGPROB}


def test_joined_deltas_are_the_choice() -> None:
    parts = [delta(3), delta(4, text="\u00e9"), delta(2, text="b", finish="stop", stop_reason="c")]
    parts[0].prompt_logprobs = [TokenLogprob(1, None)]
    whole = writer(return_token_ids=True, prompt_text="a").write(join(parts))
    assert whole == {
        "index": 0,
        "text": "a\u00e9b",
        "logprobs": {
            "tokens": ["a", "\ufffd", "\ufffd", "bc"],
            "token_logprobs": [None, -3.0, -4.0, -2.0],
            "top_logprobs": [None, {"\ufffd": -3.0}, {"\ufffd": -4.0}, {"bc": -2.0}],
            "text_offset": [0, 1, 1, 2],
        },
        "finish_reason": "stop",
        "stop_reason": "c",
        "token_ids": [3, 4, 2],
        "prompt_token_ids": [1],
    }
    chunked = writer(return_token_ids=True, prompt_text="a")
    chunks = [chunked.write(part) for part in parts]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for column, entries in whole["logprobs"].items():
        assert [item for chunk in chunks for item in chunk["logprobs"][column]] == entries


def test_an_aborted_prompt_has_no_logprobs_to_echo() -> None:
    chunk = writer(prompt_text="a").write(delta(finish="abort"))
    assert chunk["logprobs"]["tokens"] == []
    assert chunk["finish_reason"] == "abort"


def test_a_prompt_that_was_read_before_the_abort_is_echoed() -> None:
    first = delta(3)
    first.prompt_logprobs = [TokenLogprob(1, None)]
    chunk = writer(prompt_text="a").write(join([first, Delta(0, finish_reason="abort")]))
    assert chunk["logprobs"]["tokens"] == ["a", "\ufffd"] and chunk["finish_reason"] == "abort"


def test_a_lost_logprob_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="one logprob per generated token"):
        writer().write(Delta(0, "a", [1]))
    with pytest.raises(AssertionError, match="echo with logprobs"):
        writer(prompt_text="a").write(delta(1))
