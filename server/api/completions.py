"""POST /v1/completions: from a checked body to engine requests, and from their deltas to one response or a stream.

Everything that can be refused is refused before the first byte of a 200. `chat.py` answers in the same way, with choices and
objects of its own: what differs are a `Generation`'s hooks.
Neighbours: `schemas.py` and `prompts.py` check, `choices.py` writes choices, `streaming.py` merges and sends.
"""

from __future__ import annotations

import logging
import math
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from fastapi import FastAPI, Request, Response

from lrt_core.grammar import Grammar
from lrt_core.sampling_params import SamplingParams
from server.api.body import read_object
from server.api.choices import ChoiceWriter, Chunk
from server.api.errors import bad_request, from_exception
from server.api.events import DONE, KEEP_ALIVE, ChunkWriter, event, whole
from server.api.prompts import Prompt, PromptOptions, PromptReader
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
from server.api.structured import compile_grammar
from server.api.threads import MANY_CHARACTERS, MANY_ITEMS, run_beside
from server.api.values import is_request_id
from server.engine.async_engine import RequestStream
from server.engine.request import Delta, GenerationRequest

logger = logging.getLogger(__name__)

FieldsT = TypeVar("FieldsT", bound=GenerationFields)
AnyFieldsT = TypeVar("AnyFieldsT", bound=RequestFields)

MAX_LATENT_BYTES = 2**26
"""Of all latents that one request may ask for."""
MAX_LOGPROB_ENTRIES = 2**20
"""Logprobs that one request may ask for, of all its tokens and choices; each takes some hundreds of bytes on its way."""


class Writer(Protocol):
    """Writes one choice."""

    def write(self, delta: Delta) -> Chunk:
        """The choice as far as `delta` says, or, of all deltas joined, the whole choice."""

    def opening(self, delta: Delta) -> list[Chunk]:
        """What a stream tells before the choice's first delta, and before its tokens count."""

    def chunks(self, delta: Delta) -> list[Chunk]:
        """What a stream tells of `delta`."""


class Generation(ABC, Generic[FieldsT]):
    """One call: its prompts, the choices in the making and the tokens counted so far."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    """The `object` of a response and of a stream's chunks."""

    def __init__(self, service: Service, fields: FieldsT, prompts: Sequence[Prompt], id: str) -> None:
        self.fields, self.prompts, self.id = fields, prompts, id
        self.grammar: Grammar | None = None
        """What the text has to match; set before the engine is asked."""
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
        self._num_generated = self._num_failed = 0
        self._num_cached = [0] * len(prompts)

    async def requests(self) -> list[GenerationRequest]:
        """What the engine is asked for: one request per prompt. Raises ApiError."""
        is_long = sum(map(len, self.fields.bad_words)) > MANY_CHARACTERS
        sampling = await run_beside(is_long, lambda: self.fields.sampling_params(self._engine.tokenizer))
        return [self._request(index, prompt, sampling) for index, prompt in enumerate(self.prompts)]

    def chunks(self, index: int, delta: Delta) -> Iterator[Chunk]:
        """The chunks that `delta` of the prompt at `index` makes; counts its tokens before the first that carries some. Raises
        RequestError where it is the end of the last sample and none could go on."""
        writer = self._writers[index * self.fields.n + delta.index]
        yield from writer.opening(delta)
        self._count(index, delta)
        yield from writer.chunks(delta)

    def choices(self, deltas: Sequence[tuple[int, Delta]]) -> list[Chunk]:
        """All choices in order, from one delta for each sample, with the index of its prompt; the best where there are more
        samples than choices, best first. Counts all tokens. Raises RequestError where no sample could go on."""
        by_prompt: list[list[Delta]] = [[] for _ in self.prompts]
        for index, delta in deltas:
            self._count(index, delta)
            by_prompt[index].append(delta)
        writers = iter(self._writers)
        return [next(writers).write(delta) for samples in by_prompt for delta in _best(samples, self.fields.n)]

    def body(self, choices: Sequence[Chunk], **more: Any) -> dict[str, Any]:
        """The response object around `choices`."""
        return {**self.head, "choices": choices, **more}

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated; a prompt counts once however many samples it has, a sample also if it is not answered."""
        num_prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_generated,
            "total_tokens": num_prompt_tokens + self._num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached)},
        }

    def _count(self, index: int, delta: Delta) -> None:
        if delta.error is not None:
            self._num_failed += 1
            if self._num_failed == len(self.prompts) * self._num_samples:
                raise delta.error
        self._num_generated += len(delta.token_ids)
        self._num_cached[index] = max(self._num_cached[index], delta.num_cached_tokens)

    @abstractmethod
    def _writer(self, index: int, prompt: Prompt) -> Writer:
        """What writes the choice at `index`."""

    @property
    def _hidden_size(self) -> int | None:
        """Numbers of a latent; None where none are asked for."""
        return None if self.fields.latents is None else self._engine.model_config.hidden_size

    @property
    def _num_samples(self) -> int:
        """Samples generated for each prompt."""
        return self.fields.n

    @property
    @abstractmethod
    def _num_logprobs(self) -> int | None:
        """Alternatives that the engine is to report beside each generated token's logprob; None for no logprobs."""

    @property
    def _num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens."""
        return self.fields.prompt_logprobs

    def _request(self, index: int, prompt: Prompt, sampling: SamplingParams) -> GenerationRequest:
        return self.fields.generation_request(
            f"{self.id}-{index}",
            prompt.ids,
            sampling,
            self._engine.config.max_model_len,
            num_samples=self._num_samples,
            logprobs=self._num_logprobs,
            prompt_logprobs=self._num_prompt_logprobs,
            grammar=self.grammar,
        )


class Completion(Generation[CompletionRequest]):
    """A call of this route."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _writer(self, index: int, prompt: Prompt) -> ChoiceWriter:
        fields = self.fields
        return ChoiceWriter(
            self._engine.tokenizer,
            index,
            prompt.ids,
            prompt_text=self._shown(prompt) if fields.echo else None,
            hidden=prompt.hidden,
            logprobs=fields.logprobs,
            prompt_logprobs=fields.prompt_logprobs,
            return_token_ids=fields.return_token_ids,
            hidden_size=self._engine.model_config.hidden_size if fields.latents is not None else None,
        )

    def _shown(self, prompt: Prompt) -> str:
        return self._engine.tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text

    @property
    def _num_samples(self) -> int:
        return self.fields.num_samples

    @property
    def _num_logprobs(self) -> int | None:
        is_ranked = self.fields.num_samples > self.fields.n
        return 0 if self.fields.logprobs is None and is_ranked else self.fields.logprobs

    @property
    def _num_prompt_logprobs(self) -> int | None:
        wanted = (self.fields.prompt_logprobs, self.fields.logprobs if self.fields.echo else None)
        return max((count for count in wanted if count is not None), default=None)


def _best(samples: Sequence[Delta], count: int) -> list[Delta]:
    """The samples of one prompt in order; the `count` of highest mean logprob, falling, where there are more than that."""
    ordered = sorted(samples, key=lambda delta: delta.index)
    return ordered if len(ordered) <= count else sorted(ordered, key=_mean_logprob, reverse=True)[:count]


def _mean_logprob(sample: Delta) -> float:
    """Of the generated tokens, an end-of-sequence id included; the worst for a sample without any, or one that went wrong."""
    if sample.error is not None:
        return -math.inf
    logprobs = [-math.inf if entry.logprob is None else entry.logprob for entry in sample.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


def add_completions(app: FastAPI, service: Service) -> None:
    """Add the route to `app`."""
    reader = PromptReader.of(service.engine.tokenizer, service.engine.config.max_model_len)

    @app.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        """Complete one or several prompts."""
        fields, headers = await read_fields(request, CompletionRequest, service)
        prompts = await reader.read(fields.prompt, fields.max_tokens, PromptOptions.of(fields))
        id = response_id(Completion.id_prefix, fields, request.headers)
        return await answer(service, request, Completion(service, fields, prompts, id), headers)


async def read_fields(request: Request, kind: type[AnyFieldsT], service: Service) -> tuple[AnyFieldsT, dict[str, str]]:
    """The checked body of a request, and the headers that its response has to carry. Raises ApiError."""
    data = await read_object(request, service.max_body_size)
    fields, dropped = parse_fields(kind, data, service.lenient, service.max_logprobs)
    if fields.model is not None:
        service.check_model(fields.model)
    return fields, _warning(dropped)


async def answer(service: Service, request: Request, generation: Generation[Any], headers: Mapping[str, str]) -> Response:
    """Run a call: one response or a stream. Raises ApiError, RequestError or AdmissionError before the first byte."""
    fields = generation.fields
    check_latents(service, fields)
    generation.grammar = await compile_grammar(service.engine, fields.response_format, fields.structured_outputs)
    requests = await generation.requests()
    check_latent_bytes(service, requests)
    num_logprobs = check_logprobs(requests, "logprobs" if fields.prompt_logprobs is None else "prompt_logprobs")
    streams = service.engine.admit_all(requests)
    logger.debug("%s: %d prompts, user %r", generation.id, len(requests), fields.user)
    if fields.stream:
        return EventStreamResponse(_events(generation, streams, service.stream_interval), streams, headers)
    async with aborting(streams):
        body = await until_disconnect(request.receive, _collect(generation, streams, num_logprobs > MANY_ITEMS))
    return Response(body, headers=dict(headers), media_type="application/json")


def response_id(prefix: str, fields: GenerationFields, headers: Mapping[str, str]) -> str:
    """What a response is called: as the client says in the body, else in a usable X-Request-Id, else as nothing else is."""
    if fields.request_id is not None:
        return fields.request_id
    given = headers.get("x-request-id", "")
    return given if is_request_id(given) else f"{prefix}-{uuid.uuid4().hex}"


def check_latents(service: Service, fields: GenerationFields) -> None:
    """Raise ApiError (400) where latents are asked of a model that has none."""
    if fields.latents is not None and service.engine.model_config.recurrence is None:
        raise bad_request("'latents' is not supported: this checkpoint is a plain transformer without latents", param="latents")


def check_latent_bytes(service: Service, requests: Sequence[GenerationRequest]) -> None:
    """Raise ApiError (400) where the latents asked for may come to more than one response should carry."""
    num_rows = sum(
        item.n * (1 if item.latents == "last" else len(item.prompt_ids) + item.stopping.max_tokens)
        for item in requests
        if item.latents is not None
    )
    num_bytes = 4 * num_rows * service.engine.model_config.hidden_size
    if num_bytes > MAX_LATENT_BYTES:
        message = f"'latents' may come to {num_bytes} bytes, more than {MAX_LATENT_BYTES}; ask for fewer samples or tokens"
        raise bad_request(message, param="latents")


def check_logprobs(requests: Sequence[GenerationRequest], param: str) -> int:
    """How many logprobs may come. Raise ApiError (400), which names `param`, for more than one response should carry."""
    num_entries = sum(
        item.n
        * (_num_entries(item.logprobs, item.stopping.max_tokens) + _num_entries(item.prompt_logprobs, len(item.prompt_ids)))
        for item in requests
    )
    if num_entries > MAX_LOGPROB_ENTRIES:
        message = f"'{param}' may come to {num_entries} entries, more than {MAX_LOGPROB_ENTRIES}; ask for fewer or in parts"
        raise bad_request(message, param=param)
    return num_entries


def _num_entries(num_alternatives: int | None, num_tokens: int) -> int:
    return 0 if num_alternatives is None else (1 + num_alternatives) * num_tokens


def _warning(dropped: Sequence[str]) -> dict[str, str]:
    if not dropped:
        return {}
    names = re.sub(r"[^\w.\- ,]", "?", ", ".join(dropped), flags=re.ASCII)
    return {"warning": f'299 lrt-server "ignored unknown fields: {names[:500]}"'}


async def _collect(generation: Generation[Any], streams: Sequence[RequestStream], is_long: bool) -> bytes:
    """The whole response's JSON. Raises ApiError."""

    def write() -> bytes:
        choices = generation.choices(deltas)
        return whole(generation.head, choices, {"usage": generation.usage()})

    try:
        deltas = await gather(streams)
        return await run_beside(is_long, write)
    except Exception as error:
        raise from_exception(error) from error


async def _events(generation: Generation[Any], streams: Sequence[RequestStream], interval: int) -> AsyncGenerator[bytes, None]:
    """Server-sent events: a chunk per `interval` deltas of a sample, usage if asked for, [DONE]; a failure is an event before
    that."""
    include_usage, is_continuous = generation.fields.include_usage, generation.fields.continuous_usage
    writer = ChunkWriter(generation.head, {"usage": None} if include_usage else {})

    def write(chunk: Chunk) -> bytes:
        return event(generation.body([chunk], usage=generation.usage())) if is_continuous else writer.write(chunk)

    try:
        async with aclosing(merge(streams, KEEP_ALIVE_SECONDS, interval)) as batches:
            async for batch in batches:
                yield b"".join([write(chunk) for item in batch for chunk in generation.chunks(*item)]) or KEEP_ALIVE
        if include_usage:
            yield event(generation.body([], usage=generation.usage()))
    except Exception as error:
        yield event(from_exception(error).body)
    yield DONE
