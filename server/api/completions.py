"""POST /v1/completions: from a checked body to engine requests, and from their deltas to one response or a stream.

Everything that can be refused is refused before the first byte of a 200.
Neighbours: `schemas.py` and `prompts.py` check, `choices.py` writes choices, `streaming.py` merges and sends.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from operator import itemgetter
from typing import Any

from fastapi import FastAPI, Request, Response

from lrt_core.grammar import Grammar
from server.api.body import read_object
from server.api.choices import ChoiceWriter, Chunk
from server.api.errors import from_exception, json_response
from server.api.events import DONE, KEEP_ALIVE, ChunkWriter, event
from server.api.prompts import Prompt, PromptReader
from server.api.schemas import CompletionRequest, parse_fields
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
from server.engine.async_engine import RequestStream
from server.engine.request import Delta, GenerationRequest


class Completion:
    """One call: its prompts, the choices in the making and the tokens counted so far."""

    def __init__(self, service: Service, fields: CompletionRequest, prompts: Sequence[Prompt], grammar: Grammar | None) -> None:
        self.fields, self.prompts, self._grammar = fields, prompts, grammar
        self.id = f"cmpl-{uuid.uuid4().hex}"
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
        """What the engine is asked for: one request per prompt."""
        return [self._request(index, prompt) for index, prompt in enumerate(self.prompts)]

    def write(self, index: int, delta: Delta) -> Chunk:
        """The chunk that `delta` of the prompt at `index` makes; counts its tokens."""
        self._num_generated += len(delta.token_ids)
        self._num_cached[index] = max(self._num_cached[index], delta.num_cached_tokens)
        return self._writers[index * self.fields.n + delta.index].write(delta)

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

    def _request(self, index: int, prompt: Prompt) -> GenerationRequest:
        fields = self.fields
        room = self._engine.config.max_model_len - len(prompt.ids)
        return GenerationRequest(
            request_id=f"{self.id}-{index}",
            prompt_ids=prompt.ids,
            sampling=fields.sampling_params(self._engine.tokenizer.vocab_size),
            stopping=fields.stopping_params(room),
            n=fields.n,
            logprobs=fields.logprobs,
            prompt_logprobs=fields.logprobs if fields.echo else None,
            grammar=self._grammar,
        )


def add_completions(app: FastAPI, service: Service) -> None:
    """Add the route to `app`."""
    reader = PromptReader.of(service.engine.tokenizer, service.engine.config.max_model_len)

    @app.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        """Complete one or several prompts."""
        data = await read_object(request, service.max_body_size)
        fields, dropped = parse_fields(CompletionRequest, data, service.lenient)
        if fields.model is not None:
            service.check_model(fields.model)
        prompts = await reader.read(fields.prompt, fields.max_tokens)
        grammar = await compile_grammar(service.engine, fields.response_format, fields.structured_outputs)
        completion = Completion(service, fields, prompts, grammar)
        headers = _warning(dropped)
        streams = service.engine.admit_all(completion.requests())
        if fields.stream:
            return EventStreamResponse(_events(completion, streams), streams, headers)
        async with aborting(streams):
            return json_response(await until_disconnect(request.receive, _collect(completion, streams)), headers=headers)


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
    choices = [completion.write(index, delta) for index, delta in deltas]
    return completion.body(sorted(choices, key=itemgetter("index")), usage=completion.usage())


async def _events(completion: Completion, streams: Sequence[RequestStream]) -> AsyncGenerator[bytes, None]:
    """Server-sent events: a chunk per delta, usage if asked for, [DONE]; a failure is an event of its own before that."""
    include_usage = completion.fields.include_usage
    writer = ChunkWriter(completion.head, {"usage": None} if include_usage else {})
    try:
        async with aclosing(merge(streams, KEEP_ALIVE_SECONDS)) as batches:
            async for batch in batches:
                yield b"".join([writer.write(completion.write(*item)) for item in batch]) or KEEP_ALIVE
        if include_usage:
            yield event(completion.body([], usage=completion.usage()))
    except Exception as error:
        yield event(from_exception(error).body)
    yield DONE
