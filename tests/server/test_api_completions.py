"""Completions end to end over a scripted engine: plain and streamed responses, failures, clients that go away."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterable
from typing import Any

import pytest

from server.api import completions, streaming
from server.engine.request import AdmissionError, Delta, GenerationRequest, PromptTooLongError, RequestError
from tests.server.fakes import Client, FakeEngine, Step, assert_envelope, call, complete, events, make_app, say


def test_plain_response() -> None:
    response = complete(FakeEngine(say("abc")))
    body = response.json()
    assert response.headers["content-type"] == "application/json"
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": "weights-float32-window",
        "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_choices_are_ordered_by_prompt_then_sample() -> None:
    def script(request: GenerationRequest) -> list[Step]:
        texts = [f"{request.prompt_ids[0]}.{sample}" for sample in range(request.n)]
        deltas = [Delta(i, text, [1, 2], finish_reason="stop", num_cached_tokens=2) for i, text in enumerate(texts)]
        return list(reversed(deltas))

    body = complete(FakeEngine(script), prompt=[[7], [8, 9]], n=2).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "7.0"), (1, "7.1"), (2, "8.0"), (3, "8.1")]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 8,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_stream_chunks() -> None:
    found = events(complete(FakeEngine(say("ab")), stream=True))
    assert [chunk["choices"][0]["text"] for chunk in found] == ["a", "b"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [None, "length"]
    assert len({chunk["id"] for chunk in found}) == 1
    assert all("usage" not in chunk and chunk["object"] == "text_completion" for chunk in found)


def test_stream_with_usage_has_it_once_and_last() -> None:
    found = events(complete(FakeEngine(say("ab")), stream=True, stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in found[:-1]] == [None, None]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "fields", [{}, {"echo": True}, {"echo": True, "logprobs": 2}, {"logprobs": 0}, {"return_token_ids": True}]
)
@pytest.mark.parametrize("prompt", ["th\u00e9", ["a", "b"], [[116, 195], [169]]])
def test_stream_says_what_the_plain_response_says(prompt: Any, fields: dict[str, Any]) -> None:
    plain = complete(FakeEngine(say("abc")), prompt=prompt, n=2, **fields).json()["choices"]
    merged: dict[int, Any] = {}
    for chunk in events(complete(FakeEngine(say("abc")), prompt=prompt, n=2, stream=True, **fields)):
        (choice,) = chunk["choices"]
        whole = merged.setdefault(choice["index"], choice)
        if whole is not choice:
            assert whole["finish_reason"] is None
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
            for column in whole["logprobs"] or ():
                whole["logprobs"][column] += choice["logprobs"][column]
            if "token_ids" in whole:
                whole["token_ids"] += choice["token_ids"]
    assert [merged[index] for index in sorted(merged)] == plain


def test_echo_of_a_text_is_that_text_and_of_ids_their_decoding() -> None:
    def text(prompt: Any, **fields: Any) -> Any:
        return complete(FakeEngine(say("!")), prompt=prompt, echo=True, **fields).json()["choices"][0]["text"]

    engine = FakeEngine()
    assert text("the \u00e9") == "the \u00e9!"
    assert text([engine.tokenizer.bos_id, 104]) == "<|bos|>h!"
    assert text([104], max_tokens=0) == "h"
    assert text("<|bos|>") == "<|bos|>!"


def test_echo_with_logprobs_covers_prompt_and_completion() -> None:
    logprobs = complete(FakeEngine(say("!?")), prompt="hi", echo=True, logprobs=1).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<|bos|>", "h", "i", "!", "?"]
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, {"h": -1.0}, {"i": -2.0}, {"!": -0.5}, {"?": -0.5}]
    assert logprobs["text_offset"] == [0, 0, 1, 2, 3]


def test_nothing_generated_with_echo_is_the_prompt_alone() -> None:
    (choice,) = complete(FakeEngine(), prompt=[104, 105], echo=True, logprobs=1, max_tokens=0).json()["choices"]
    assert choice["text"] == "hi"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (AdmissionError("queue_full", "too many"), 429, "queue_full"),
        (AdmissionError("draining", "draining"), 503, "draining"),
        (AdmissionError("engine_dead", "dead"), 500, "internal_error"),
    ],
)
def test_refusals_come_before_any_200(error: Exception, status: int, code: str) -> None:
    engine = FakeEngine()

    def refuse(_requests: Iterable[GenerationRequest]) -> Any:
        raise error

    engine.admit_all = refuse  # type: ignore[method-assign]
    for stream in (False, True):
        response = complete(engine, stream=stream)
        assert_envelope(response, status, code)
        assert ("retry-after" in response.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("error", "code"),
    [(PromptTooLongError("This model's maximum context length is 3"), "context_length_exceeded"), (RequestError("no"), None)],
)
def test_what_can_never_fit_is_the_clients_error(error: RequestError, code: str | None) -> None:
    engine = FakeEngine()

    def refuse(request: GenerationRequest) -> None:
        if request.prompt_ids == (2,):
            raise error

    engine.check = refuse  # type: ignore[method-assign]
    told = assert_envelope(complete(engine, prompt=[[1], [2]]), 400, code or "invalid_request_error", "prompt")
    assert told == str(error)
    assert engine.requests == []


def test_several_prompts_are_admitted_together_or_not_at_all() -> None:
    engine = FakeEngine(capacity=2)
    assert_envelope(complete(engine, prompt=[[1], [2], [3]]), 429, "queue_full")
    assert engine.streams == []


def failing(_request: GenerationRequest) -> Iterable[Step]:
    return [Delta(0, "a", [1]), RuntimeError("secret")]


def test_failure_while_generating_is_a_500() -> None:
    engine = FakeEngine(failing)
    assert "secret" not in assert_envelope(complete(engine), 500, "internal_error")
    assert engine.num_in_flight == 0


def test_failure_in_a_stream_is_an_event() -> None:
    engine = FakeEngine(failing)
    first, last = events(complete(engine, stream=True, stream_options={"include_usage": True}))
    assert first["choices"][0]["text"] == "a"
    assert last["error"]["code"] == "internal_error" and "secret" not in last["error"]["message"]
    assert engine.num_in_flight == 0


def test_one_failing_prompt_ends_the_others() -> None:
    never = threading.Event()
    engine = FakeEngine(lambda request: failing(request) if request.prompt_ids == (1,) else [never])
    assert_envelope(complete(engine, prompt=[[1], [2]]), 500, "internal_error")
    assert all(stream.is_closed for stream in engine.streams)


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "KEEP_ALIVE_SECONDS", 0.01)

    async def run() -> list[bytes]:
        go = threading.Event()
        engine = FakeEngine(lambda _request: [Delta(0, "a", [1]), go, Delta(0, "b", [2], finish_reason="length")])
        client = Client(make_app(engine), stream=True)
        while client.body.count(b": keep-alive\n\n") < 2:
            await asyncio.sleep(0.005)
        go.set()
        await client.task
        return client.parts

    parts = asyncio.run(run())
    assert b'"a"' in parts[0] and parts[1] == parts[2] == b": keep-alive\n\n"
    assert parts[-2].startswith(b"data: ") and b'"b"' in parts[-2] and parts[-1] == b"data: [DONE]\n\n"


def test_silence_is_filled_also_when_one_of_several_streams_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "KEEP_ALIVE_SECONDS", 0.01)

    async def run() -> None:
        go, ending = threading.Event(), Delta(0, "a", [1], finish_reason="length")
        engine = FakeEngine(lambda item: [ending] if item.prompt_ids == (1,) else [go, ending])
        client = Client(make_app(engine), stream=True, prompt=[[1], [2]])
        while client.body.count(b": keep-alive\n\n") < 2:
            await asyncio.sleep(0.005)
        go.set()
        await client.task
        assert client.body.count(b'"finish_reason":"length"') == 2 and client.body.endswith(b"data: [DONE]\n\n")

    asyncio.run(asyncio.wait_for(run(), 30))


def test_tokens_gather_in_events_but_for_the_first_and_the_last() -> None:
    async def run() -> list[bytes]:
        goes = [threading.Event(), threading.Event(), threading.Event()]
        end = Delta(0, "g", [7], finish_reason="length")
        steps = [Delta(0, "a", [1]), goes[0], Delta(0, "b", [2]), Delta(0, "c", [3]), goes[1], Delta(0, "d", [4]), goes[2]]
        engine = FakeEngine(lambda _request: [*steps, Delta(0, "e", [5]), end])
        client = Client(make_app(engine, stream_interval=3), stream=True, return_token_ids=True)
        for num_parts, go in zip((1, 1, 2), goes, strict=True):
            while len(client.parts) < num_parts:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.02)  # what should wait has time to come
            go.set()
        await client.task
        return client.parts

    parts = asyncio.run(asyncio.wait_for(run(), 30))
    assert [re.search(rb'"token_ids":\[([\d,]*)\]', part)[1] for part in parts[:-1]] == [b"1", b"2,3,4", b"5,7"]  # type: ignore[index]
    assert [re.search(rb'"text":"(\w*)"', part)[1] for part in parts[:-1]] == [b"a", b"bcd", b"eg"]  # type: ignore[index]


def test_tokens_gather_for_each_choice_by_itself() -> None:
    """One sample gets on while the other waits: nothing of the one makes an event of the other."""
    steps: list[Delta] = [Delta(0, "a", [1]), *(Delta(0, "b", [2]) for _ in range(3)), Delta(1, "c", [3])]
    for _ in range(6):
        steps += [Delta(0, "b", [2]), Delta(1, "d", [4])]
    steps += [Delta(0, "e", [5], finish_reason="length"), Delta(1, "f", [6], finish_reason="length")]
    app = make_app(FakeEngine(lambda _request: steps), stream_interval=5)
    body = {"model": "tiny", "prompt": "hi", "stream": True, "return_token_ids": True, "n": 2}
    found = [
        choice
        for chunk in events(call(app, "POST", "/v1/completions", content=json.dumps(body)))
        for choice in chunk["choices"]
    ]
    for index, text, most in ((0, "abbbbbbbbbe", 3), (1, "cddddddf", 3)):
        own = [choice for choice in found if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == text and len(own) <= most
        assert {len(choice["token_ids"]) for choice in own[1:-1]} <= {5}


def test_silence_ends_the_gathering_and_an_error_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "GATHER_SECONDS", 0.02)

    async def run() -> list[bytes]:
        go = threading.Event()
        steps = [Delta(0, "a", [1]), Delta(0, "b", [2]), go, Delta(0, "c", [3]), ValueError("broken")]
        client = Client(make_app(FakeEngine(lambda _request: steps), stream_interval=100), stream=True)
        while b'b"' not in client.body:
            await asyncio.sleep(0.005)
        go.set()
        await client.task
        return client.parts

    parts = asyncio.run(asyncio.wait_for(run(), 30))
    assert b'"text":"c"' in parts[-3] and b'"error"' in parts[-2] and parts[-1] == b"data: [DONE]\n\n"
    assert b": keep-alive\n\n" not in parts


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_requests(stream: bool) -> None:
    async def run() -> None:
        engine = FakeEngine(lambda _request: [Delta(0, "a", [1]), threading.Event()])
        client = Client(make_app(engine), stream=stream, prompt=[[1], [2]])
        while engine.num_in_flight < 2 or (stream and client.body.count(b"data: ") < 2):
            await asyncio.sleep(0.001)
        assert not client.task.done()
        client.leave()
        await asyncio.wait_for(client.task, 5)
        assert [fake.is_closed for fake in engine.streams] == [True, True]
        assert b"[DONE]" not in client.body
        assert client.status == (200 if stream else 499)

    asyncio.run(run())


def test_a_cancelled_stream_aborts_its_requests() -> None:
    async def run() -> None:
        engine = FakeEngine(lambda _request: [threading.Event()])
        client = Client(make_app(engine), stream=True)
        while not engine.streams:
            await asyncio.sleep(0)
        client.task.cancel()
        await asyncio.gather(client.task, return_exceptions=True)
        assert engine.streams[0].is_closed
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
