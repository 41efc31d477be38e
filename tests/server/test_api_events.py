"""A stream's chunks, written from a prepared frame, byte for byte as their plain encoding."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.events import ChunkWriter, event

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


@pytest.mark.parametrize("delta", [{}, {"role": "assistant", "content": ""}])
def test_chunks_without_an_ordinary_token(delta: dict[str, str]) -> None:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}
    assert ChunkWriter(HEAD, {}).write(choice) == event({**HEAD, "choices": [choice]})
