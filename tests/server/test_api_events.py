"""A stream's chunks, written from a prepared frame, byte for byte as their plain encoding."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.events import ChunkWriter, event, whole

HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": 'a "quoted" name'}


@pytest.mark.parametrize("tail", [{}, {"usage": None}])
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    index=st.integers(0, 2000),
    finish_reason=st.sampled_from([None, "stop", "length"]),
    logprobs=st.sampled_from([None, {"tokens": ["a"], "token_logprobs": [-0.5]}]),
    more=st.sampled_from([{}, {"token_ids": [1, 2]}]),
)
def test_chunks_are_what_a_plain_encoding_says(
    tail: dict[str, Any], text: str, index: int, finish_reason: str | None, logprobs: Any, more: dict[str, Any]
) -> None:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason, "stop_reason": None, **more}
    assert ChunkWriter(HEAD, tail).write(choice) == event({**HEAD, "choices": [choice], **tail})
    delta = {"index": index, "delta": {"content": text}, **{key: choice[key] for key in list(choice)[2:]}}
    assert ChunkWriter(HEAD, tail).write(delta) == event({**HEAD, "choices": [delta], **tail})


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_an_event_is_one_line_to_every_client(text: str) -> None:
    text += "\x85\u2028\u2029\x0b\x1c"
    data = ChunkWriter(HEAD, {}).write({"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None})
    [line, _] = data.decode().splitlines()
    assert json.loads(line.removeprefix("data: "))["choices"][0]["text"] == text
    [line, _] = event({"text": text}).decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_whole_response_is_what_a_plain_encoding_says(number: int) -> None:
    choices = [{"index": index, "text": "\u00e9"} for index in range(number)]
    tail = {"usage": {"total_tokens": 3}}
    assert b"data: " + whole(HEAD, choices, tail) + b"\n\n" == event({**HEAD, "choices": choices, **tail})


@pytest.mark.parametrize("delta", [{}, {"role": "assistant", "content": ""}])
def test_chunks_without_an_ordinary_token(delta: dict[str, str]) -> None:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}
    assert ChunkWriter(HEAD, {}).write(choice) == event({**HEAD, "choices": [choice]})
