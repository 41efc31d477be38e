"""POST /v1/completions: from a checked body to engine requests, and from their deltas to one response or a stream.

Everything that can be refused is refused before the first byte of a 200.
Neighbours: `schemas.py` and `prompts.py` check, `choices.py` writes choices, `streaming.py` merges and sends.
"""

from __future__ import annotations

import logging
import math
import re
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response

from server.api.body import read_object
from server.api.choices import ChoiceWriter, Chunk
from server.api.errors import bad_request, from_exception, json_response
from server.api.events import DONE, KEEP_ALIVE, ChunkWriter, event
from server.api.prompts import Prompt, PromptOptions, PromptReader
from server.api.schemas import CompletionRequest, GenerationFields, is_request_id, parse_fields
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

logger = logging.getLogger(__name__)

MAX_LATENT_BYTES = 2**26
"""Of all latents that one request may ask for."""
MAX_LOGPROB_ENTRIES = 2**20
"""Logprobs that one request may ask for, of all its tokens and choices; each takes some hundreds of bytes on its way."""


class Completion:
    """One call: its prompts, the choices in the making and the tokens counted so far."""

    def __init__(self, service: Service, fields: CompletionRequest, prompts: Sequence[Prompt], id: str) -> None:
        self.fields, self.prompts, self.id = fields, prompts, id
        self._engine = service.engine
        self.head = {
            "id": self.id,
            "object": "text_completion",
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
        """What the engine is asked for: one request per prompt. Raises ApiError."""
        return [self._request(index, prompt) for index, prompt in enumerate(self.prompts)]

    def write(self, index: int, delta: Delta) -> Chunk:
        """The chunk that `delta` of the prompt at `index` makes; counts its tokens."""
        self._count(index, delta)
        return self._writers[index * self.fields.n + delta.index].write(delta)

    def choices(self, deltas: Sequence[tuple[int, Delta]]) -> list[Chunk]:
        """All choices in order, from one delta for each sample, with the index of its prompt; the best where there are more
        samples than choices, best first. Counts all tokens."""
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
        self._num_generated += len(delta.token_ids)
        self._num_cached[index] = max(self._num_cached[index], delta.num_cached_tokens)

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

    def _request(self, index: int, prompt: Prompt) -> GenerationRequest:
        fields, is_ranked = self.fields, self.fields.num_samples > self.fields.n
        of_prompt = [count for count in (fields.prompt_logprobs, fields.logprobs if fields.echo else None) if count is not None]
        return fields.generation_request(
            f"{self.id}-{index}",
            prompt.ids,
            self._engine.tokenizer,
            self._engine.config.max_model_len,
            num_samples=fields.num_samples,
            logprobs=0 if fields.logprobs is None and is_ranked else fields.logprobs,
            prompt_logprobs=max(of_prompt, default=None),
        )


def _best(samples: Sequence[Delta], count: int) -> list[Delta]:
    """The samples of one prompt in order; the `count` of highest mean logprob, falling, where there are more than that."""
    ordered = sorted(samples, key=lambda delta: delta.index)
    return ordered if len(ordered) <= count else sorted(ordered, key=_mean_logprob, reverse=True)[:count]


def _mean_logprob(sample: Delta) -> float:
    """Of the generated tokens, an end-of-sequence id included; the worst for a sample without any."""
    logprobs = [-math.inf if entry.logprob is None else entry.logprob for entry in sample.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


def add_completions(app: FastAPI, service: Service) -> None:
    """Add the route to `app`."""
    reader = PromptReader.of(service.engine.tokenizer, service.engine.config.max_model_len)

    @app.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        """Complete one or several prompts."""
        data = await read_object(request, service.max_body_size)
        fields, dropped = parse_fields(CompletionRequest, data, service.lenient, service.max_logprobs)
        if fields.model is not None:
            service.check_model(fields.model)
        check_latents(service, fields)
        prompts = await reader.read(fields.prompt, fields.max_tokens, PromptOptions.of(fields))
        completion = Completion(service, fields, prompts, response_id("cmpl-", fields, request.headers))
        requests = completion.requests()
        check_latent_bytes(service, requests)
        check_logprobs(requests, "logprobs" if fields.prompt_logprobs is None else "prompt_logprobs")
        headers = _warning(dropped)
        streams = service.engine.admit_all(requests)
        logger.debug("%s: %d prompts, user %r", completion.id, len(prompts), fields.user)
        if fields.stream:
            return EventStreamResponse(_events(completion, streams), streams, headers)
        async with aborting(streams):
            return json_response(await until_disconnect(request.receive, _collect(completion, streams)), headers=headers)


def response_id(prefix: str, fields: GenerationFields, headers: Mapping[str, str]) -> str:
    """What a response is called: as the client says in the body, else in a usable X-Request-Id, else as nothing else is."""
    if fields.request_id is not None:
        return fields.request_id
    given = headers.get("x-request-id", "")
    return given if is_request_id(given) else f"{prefix}{uuid.uuid4().hex}"


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


def check_logprobs(requests: Sequence[GenerationRequest], param: str) -> None:
    """Raise ApiError (400), which names `param`, where more logprobs may come than one response should carry."""
    num_entries = sum(
        item.n
        * (_num_entries(item.logprobs, item.stopping.max_tokens) + _num_entries(item.prompt_logprobs, len(item.prompt_ids)))
        for item in requests
    )
    if num_entries > MAX_LOGPROB_ENTRIES:
        message = f"'{param}' may come to {num_entries} entries, more than {MAX_LOGPROB_ENTRIES}; ask for fewer or in parts"
        raise bad_request(message, param=param)


def _num_entries(num_alternatives: int | None, num_tokens: int) -> int:
    return 0 if num_alternatives is None else (1 + num_alternatives) * num_tokens


def _warning(dropped: Sequence[str]) -> dict[str, str]:
    if not dropped:
        return {}
    names = re.sub(r"[^\w.\- ,]", "?", ", ".join(dropped), flags=re.ASCII)
    return {"warning": f'299 lrt-server "ignored unknown fields: {names[:500]}"'}


async def _collect(completion: Completion, streams: Sequence[RequestStream]) -> dict[str, Any]:
    """The whole response. Raises ApiError."""
    try:
        deltas = await gather(streams)
    except Exception as error:
        raise from_exception(error) from error
    return completion.body(completion.choices(deltas), usage=completion.usage())


async def _events(completion: Completion, streams: Sequence[RequestStream]) -> AsyncGenerator[bytes, None]:
    """Server-sent events: a chunk per delta, usage if asked for, [DONE]; a failure is an event of its own before that."""
    include_usage, is_continuous = completion.fields.include_usage, completion.fields.continuous_usage
    writer = ChunkWriter(completion.head, {"usage": None} if include_usage else {})

    def write(index: int, delta: Delta) -> bytes:
        choice = completion.write(index, delta)
        return event(completion.body([choice], usage=completion.usage())) if is_continuous else writer.write(choice)

    try:
        async with aclosing(merge(streams, KEEP_ALIVE_SECONDS)) as batches:
            async for batch in batches:
                yield b"".join([write(*item) for item in batch]) or KEEP_ALIVE
        if include_usage:
            yield event(completion.body([], usage=completion.usage()))
    except Exception as error:
        yield event(from_exception(error).body)
    yield DONE
