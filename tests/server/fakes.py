"""A scripted engine behind the real HTTP application, and ways to talk to it without a socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any

import httpx
from fastapi import FastAPI

from lrt_core.chat import ChatTemplate
from lrt_core.grammar import Grammar, GrammarCompiler, GrammarSource
from server.api.app import create_app
from server.api.auth import ApiKeys
from server.api.service import NO_KEYS, Service
from server.engine.config import EngineConfig
from server.engine.request import AdmissionError, Delta, GenerationRequest, TokenLogprob
from server.engine.stream import DeltaStream
from tests.helpers import tiny_config, tiny_tokenizer

MAX_MODEL_LEN = 64
NAME = "tiny"

Step = Delta | Exception | threading.Event
Script = Callable[[GenerationRequest], Iterable[Step]]


def say(text: str, **ends: Any) -> Script:
    """A script in which each sample generates `text`, a byte a token, and ends for its length."""

    def script(request: GenerationRequest) -> list[Step]:
        steps: list[Step] = []
        data = text.encode()[: request.stopping.max_tokens]
        for sample in range(request.n):
            first = True
            for position, byte in enumerate(data):
                delta = Delta(sample, chr(byte), [byte])
                if request.logprobs is not None:
                    delta.logprobs = [TokenLogprob(byte, -0.5, ((byte, -0.5), (0, -1.5))[: request.logprobs])]
                if first and request.prompt_logprobs is not None:
                    delta.prompt_logprobs = prompt_entries(request)
                if position == len(data) - 1:
                    delta.finish_reason = "length"
                first = False
                steps.append(delta)
            if not data:
                prompt_logprobs = prompt_entries(request) if request.prompt_logprobs is not None else None
                steps.append(Delta(sample, finish_reason="length", prompt_logprobs=prompt_logprobs))
        return steps

    return script


def prompt_entries(request: GenerationRequest) -> list[TokenLogprob]:
    """Plausible logprobs of the prompt, the first without one."""
    return [TokenLogprob(id, None if i == 0 else -float(i)) for i, id in enumerate(request.prompt_ids)]


class FakeStream(DeltaStream):
    """Plays a script, a step each turn of the loop: an exception in it ends the stream, an event is waited for (any thread may
    set it)."""

    def __init__(self, engine: FakeEngine, steps: Iterable[Step], num_samples: int) -> None:
        super().__init__(num_samples)
        self._engine, self._steps = engine, list(steps)
        self.is_closed = False
        self._next: asyncio.Handle = asyncio.get_running_loop().call_soon(self._play)

    def _play(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._steps:
            self._engine.running.discard(self)
            return
        step = self._steps[0]
        if isinstance(step, threading.Event) and not step.is_set():
            if self._engine.is_aborting:
                self._steps = [Delta(0, finish_reason="abort")]
            self._next = loop.call_later(0.002, self._play)
            return
        del self._steps[0]
        if isinstance(step, Delta):
            self.push(step)
        elif isinstance(step, Exception):
            self.fail(step)
        self._next = loop.call_soon(self._play)

    async def aclose(self) -> None:
        self.is_closed = True
        self._next.cancel()
        self._engine.running.discard(self)


class FakeEngine:
    """What the API needs of `AsyncEngine`, without a model."""

    def __init__(self, script: Script | None = None, capacity: int | None = None) -> None:
        self.config = EngineConfig(max_model_len=MAX_MODEL_LEN, num_blocks=16, max_num_seqs=4)
        self.model_config = tiny_config()
        self.tokenizer = tiny_tokenizer()
        self.script = script or say("abc")
        self.capacity = capacity
        self.requests: list[GenerationRequest] = []
        self.streams: list[FakeStream] = []
        self.running: set[FakeStream] = set()
        self.error: BaseException | None = None
        self.is_draining = self.is_aborting = False
        self.is_started = self.is_stopped = False
        self.last_step_age = 0.0

    @property
    def is_ready(self) -> bool:
        return not self.is_draining and self.error is None

    @property
    def num_in_flight(self) -> int:
        return len(self.running)

    async def start(self) -> None:
        self.is_started = True

    async def stop(self, drain: bool = True) -> None:
        self.is_draining = True
        self.is_aborting = self.is_aborting or not drain
        while self.running and drain:
            await asyncio.sleep(0.005)
        self.is_stopped = True

    def check(self, request: GenerationRequest) -> None:
        """Everything fits."""

    async def compile(self, source: GrammarSource) -> Grammar:
        """At once, without a process of its own."""
        return GrammarCompiler(self.tokenizer, self.tokenizer.eos_ids).compile(source)

    def admit_all(self, requests: Iterable[GenerationRequest]) -> list[FakeStream]:
        requests = list(requests)
        for request in requests:
            self.check(request)
        if self.error is not None:
            raise AdmissionError("engine_dead", "dead")
        if self.is_draining:
            raise AdmissionError("draining", "draining")
        if self.capacity is not None and len(self.running) + len(requests) > self.capacity:
            raise AdmissionError("queue_full", "too many requests are waiting")
        return [self._admit(request) for request in requests]

    def _admit(self, request: GenerationRequest) -> FakeStream:
        self.requests.append(request)
        stream = FakeStream(self, self.script(request), request.n)
        self.streams.append(stream)
        self.running.add(stream)
        return stream


def make_app(
    engine: Any, *, max_body_size: int = 10_000, lenient: bool = False, keys: ApiKeys = NO_KEYS, stream_interval: int = 1
) -> FastAPI:
    """The application around an engine, real or not, with its tokenizer's chat template."""
    source = engine.tokenizer.chat_template
    return create_app(
        Service(
            engine=engine,
            model_names=(NAME, "alias"),
            fingerprint="weights-float32-window",
            created=1,
            exposition=lambda: b"# the metrics page\n",
            max_body_size=max_body_size,
            lenient=lenient,
            chat=None if source is None else ChatTemplate(source, engine.tokenizer),
            keys=keys,
            stream_interval=stream_interval,
        )
    )


def call(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to the application, in-process."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


class Client:
    """A request for a completion whose client can go away at any moment; what it was sent is in `parts`."""

    def __init__(self, app: FastAPI, **fields: Any) -> None:
        self.parts: list[bytes] = []
        self.status = 0
        self.is_whole = False
        """Whether the answer has come to its end."""
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        body = json.dumps({"model": NAME, "prompt": "hi", **fields}).encode()
        self._inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        self.task = asyncio.ensure_future(app(scope, self._inbox.get, self._send))

    @property
    def body(self) -> bytes:
        """What it was sent so far."""
        return b"".join(self.parts)

    def leave(self) -> None:
        """Hang up."""
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        if message["type"] == "http.response.body":
            self.is_whole = not message.get("more_body", False)
            if message["body"]:
                self.parts.append(message["body"])


def complete(engine: Any, lenient: bool = False, **fields: Any) -> httpx.Response:
    """POST /v1/completions with `model` and `prompt` filled in unless given."""
    body = {"model": NAME, "prompt": "hi", **fields}
    return call(make_app(engine, lenient=lenient), "POST", "/v1/completions", content=json.dumps(body))


def chat(engine: Any, lenient: bool = False, **fields: Any) -> httpx.Response:
    """POST /v1/chat/completions with `model` and `messages` filled in unless given."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], **fields}
    return call(make_app(engine, lenient=lenient), "POST", "/v1/chat/completions", content=json.dumps(body))


def events(response: httpx.Response) -> list[Any]:
    """The data of a response's server-sent events; the final [DONE] is checked and left out."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def assert_envelope(response: httpx.Response, status: int, code: str | None, param: str | None = None) -> str:
    """Check an error response; returns its message."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] and error["message"]
    return str(error["message"])
