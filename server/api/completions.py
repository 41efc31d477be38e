"""POST /v1/completions: from a checked body to engine requests, and from their deltas to one response or a stream.

Everything that can be refused is refused before the first byte of a 200. `chat.py` answers in the same way, with choices and
objects of its own: what differs are a `Generation`'s hooks.
Neighbours: `schemas.py` and `prompts.py` check, `choices.py` writes choices, `streaming.py` merges and sends.
"""

from __future__ import annotations

import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from operator import itemgetter
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from fastapi import FastAPI, Request, Response

from server.api.body import read_object
from server.api.choices import ChoiceWriter, Chunk
from server.api.errors import from_exception, json_response
from server.api.events import DONE, KEEP_ALIVE, ChunkWriter, event
from server.api.prompts import Prompt, PromptReader
from server.api.schemas import CompletionRequest, GenerationFields, RequestFields, parse_fields
from server.api.service import Service
from server.api.streaming import (
    KEEP_ALIVE_SECONDS,
    EventStreamResponse,
    aborting,
    gather,
    merge,
    until_disconnect,
)
from server.engine.async_engine import RequestStream
from server.engine.request import Delta, GenerationRequest

FieldsT = TypeVar("FieldsT", bound=GenerationFields)
AnyFieldsT = TypeVar("AnyFieldsT", bound=RequestFields)


class Writer(Protocol):
    """Writes one choice."""

    def write(self, delta: Delta) -> Chunk:
        """The choice as far as `delta` says, or, of all deltas joined, the whole choice."""

    def chunks(self, delta: Delta) -> list[Chunk]:
        """What a stream tells of `delta`."""


class Generation(ABC, Generic[FieldsT]):
    """One call: its prompts, the choices in the making and the tokens counted so far."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    """The `object` of a response and of a stream's chunks."""

    def __init__(self, service: Service, fields: FieldsT, prompts: Sequence[Prompt]) -> None:
        self.fields, self.prompts = fields, prompts
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._engine = service.engine
        self.head = {
            "id": self.id,
            "object": self.chunk_kind if fields.stream else self.kind,
            "created": int(time.time()),
            "model": fields.model or service.model_names[0],
            "system_fingerprint": service.fingerprint,
        }
        self._writers = [
            self._writer(i * fields.n + sample, prompt) for i, prompt in enumerate(prompts) for sample in range(fields.n)
        ]
        self._num_generated = 0
        self._num_cached = [0] * len(prompts)

    def requests(self) -> list[GenerationRequest]:
        """What the engine is asked for: one request per prompt."""
        return [self._request(index, prompt) for index, prompt in enumerate(self.prompts)]

    def write(self, index: int, delta: Delta) -> Chunk:
        """The choice that all of a sample's deltas, joined, of the prompt at `index` make; counts its tokens."""
        return self._take(index, delta).write(delta)

    def chunks(self, index: int, delta: Delta) -> list[Chunk]:
        """The chunks that `delta` of the prompt at `index` makes; counts its tokens."""
        return self._take(index, delta).chunks(delta)

    def _take(self, index: int, delta: Delta) -> Writer:
        self._num_generated += len(delta.token_ids)
        self._num_cached[index] = max(self._num_cached[index], delta.num_cached_tokens)
        return self._writers[index * self.fields.n + delta.index]

    def body(self, choices: Sequence[Chunk], **more: Any) -> dict[str, Any]:
        """The response object around `choices`."""
        return {**self.head, "choices": choices, **more}

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated; a prompt counts once however many samples it has."""
        num_prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_generated,
            "total_tokens": num_prompt_tokens + self._num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached)},
        }

    @abstractmethod
    def _writer(self, index: int, prompt: Prompt) -> Writer:
        """What writes the choice at `index`."""

    @property
    @abstractmethod
    def _num_logprobs(self) -> int | None:
        """Alternatives to report beside each generated token's logprob; None for no logprobs."""

    @property
    def _num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens."""
        return None

    def _request(self, index: int, prompt: Prompt) -> GenerationRequest:
        fields = self.fields
        room = self._engine.config.max_model_len - len(prompt.ids)
        return GenerationRequest(
            request_id=f"{self.id}-{index}",
            prompt_ids=prompt.ids,
            sampling=fields.sampling_params(self._engine.tokenizer.vocab_size),
            stopping=fields.stopping_params(room),
            n=fields.n,
            logprobs=self._num_logprobs,
            prompt_logprobs=self._num_prompt_logprobs,
        )


class Completion(Generation[CompletionRequest]):
    """A call of this route."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _writer(self, index: int, prompt: Prompt) -> ChoiceWriter:
        return ChoiceWriter(
            self._engine.tokenizer,
            index,
            prompt.ids,
            prompt_text=self._shown(prompt) if self.fields.echo else None,
            hidden=prompt.hidden,
            logprobs=self.fields.logprobs is not None,
            return_token_ids=self.fields.return_token_ids,
        )

    def _shown(self, prompt: Prompt) -> str:
        return self._engine.tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text

    @property
    def _num_logprobs(self) -> int | None:
        return self.fields.logprobs

    @property
    def _num_prompt_logprobs(self) -> int | None:
        return self.fields.logprobs if self.fields.echo else None


def add_completions(app: FastAPI, service: Service) -> None:
    """Add the route to `app`."""
    reader = PromptReader.of(service.engine.tokenizer, service.engine.config.max_model_len)

    @app.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        """Complete one or several prompts."""
        fields, headers = await read_fields(request, CompletionRequest, service)
        prompts = await reader.read(fields.prompt, fields.max_tokens)
        return await answer(service, request, Completion(service, fields, prompts), headers)


async def read_fields(request: Request, kind: type[AnyFieldsT], service: Service) -> tuple[AnyFieldsT, dict[str, str]]:
    """The checked body of a request, and the headers that its response has to carry. Raises ApiError."""
    fields, dropped = parse_fields(kind, await read_object(request, service.max_body_size), service.lenient)
    if fields.model is not None:
        service.check_model(fields.model)
    return fields, _warning(dropped)


async def answer(service: Service, request: Request, generation: Generation[Any], headers: Mapping[str, str]) -> Response:
    """Run a call: one response or a stream. Raises ApiError, RequestError or AdmissionError before the first byte."""
    streams = service.engine.admit_all(generation.requests())
    if generation.fields.stream:
        return EventStreamResponse(_events(generation, streams), streams, headers)
    async with aborting(streams):
        return json_response(await until_disconnect(request.receive, _collect(generation, streams)), headers=headers)


def _warning(dropped: Sequence[str]) -> dict[str, str]:
    if not dropped:
        return {}
    names = re.sub(r"[^\w.\- ,]", "?", ", ".join(dropped), flags=re.ASCII)
    return {"warning": f'299 lrt-server "ignored unknown fields: {names[:500]}"'}


async def _collect(generation: Generation[Any], streams: Sequence[RequestStream]) -> dict[str, Any]:
    """The whole response. Raises ApiError."""
    try:
        deltas = await gather(streams)
    except Exception as error:
        raise from_exception(error) from error
    choices = [generation.write(index, delta) for index, delta in deltas]
    return generation.body(sorted(choices, key=itemgetter("index")), usage=generation.usage())


async def _events(generation: Generation[Any], streams: Sequence[RequestStream]) -> AsyncGenerator[bytes, None]:
    """Server-sent events: a chunk per delta, usage if asked for, [DONE]; a failure is an event of its own before that."""
    include_usage = generation.fields.include_usage
    writer = ChunkWriter(generation.head, {"usage": None} if include_usage else {})
    try:
        async with aclosing(merge(streams, KEEP_ALIVE_SECONDS)) as batches:
            async for batch in batches:
                yield b"".join([writer.write(chunk) for item in batch for chunk in generation.chunks(*item)]) or KEEP_ALIVE
        if include_usage:
            yield event(generation.body([], usage=generation.usage()))
    except Exception as error:
        yield event(from_exception(error).body)
    yield DONE
