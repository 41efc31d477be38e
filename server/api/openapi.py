"""GET /openapi.json, what every route takes and answers, and GET /docs, a page that shows it without help from elsewhere.

Routes read their bodies themselves, so the document is made from the models that check those bodies and from a table of
operations; a test holds the table against the routes. Neighbours: `schemas.py`, `chat_schemas.py`, `tokenization.py` and
`responses.py` have the models, `pages/docs.html` is the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api import responses
from server.api.auth import PROBES
from server.api.chat_schemas import ChatRequest, Message
from server.api.descriptions import DESCRIPTIONS
from server.api.errors import dump_json
from server.api.routes import package_version
from server.api.schemas import CompletionRequest, StreamOptions
from server.api.service import Service
from server.api.tokenization import DetokenizeRequest, TokenizeRequest

Schema = dict[str, Any]

PAGE = Path(__file__).parent / "pages" / "docs.html"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
"""What the page may load: nothing but this server's own documents."""
DESCRIPTION = (
    "Serves a Latent Recurrent Transformer. Nothing is silently ignored: a field that is unknown or not built is refused by "
    "name with status 400; null counts as absent. Errors have one shape everywhere."
)
TAGS = {
    "generation": "Text from the model.",
    "tokens": "Text to token ids and back.",
    "models": "What is served.",
    "probes": "Whether the server is well.",
    "numbers": "How much it does, and what it is.",
    "documents": "What you read.",
}
REFUSALS = {
    400: "A field is wrong, unknown or not built, or the prompt is too long: `param` names the field.",
    401: "An API key is missing or wrong.",
    404: "The model is not served here.",
    413: "The body is larger than this server accepts.",
    429: "The queue is full; try again after `retry-after` seconds.",
    500: "The server failed.",
    503: "The server is loading, shutting down or not well; try again after `retry-after` seconds.",
}
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "One of the server's API keys."},
    "basic": {"type": "http", "scheme": "basic", "description": "The same for browsers: any name, the key as password."},
}
_ANY = (500, 503)
_BODY = (400, 404, 413, *_ANY)
_NULLABLE = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest, StreamOptions, Message)
"""Models in which null counts as absent."""
_REQUESTS = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
_NULL: Schema = {"type": "null"}
_NO_MODEL = "MODEL"
"""Stands in examples for the served name."""


@dataclass(frozen=True)
class Operation:
    """What a route takes and answers. answer: model of the JSON in a 200, None for another `media_type`. stream: model of the
    events' JSON, where a response can be a stream. examples: bodies by name; example, stream_example: of an answer and of an
    event. statuses: of errors."""

    tag: str
    summary: str
    answer: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    stream: type[BaseModel] | None = None
    examples: Mapping[str, Any] = field(default_factory=dict)
    example: Any = None
    stream_example: Any = None
    statuses: tuple[int, ...] = _ANY
    media_type: str = "application/json"
    parameters: tuple[Schema, ...] = ()
    methods: tuple[str, ...] = ("get",)


_HEAD = {"id": "cmpl-1", "created": 1750000000, "model": _NO_MODEL, "system_fingerprint": "1a2b3c4d-float32-window"}
_USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 0},
}
_END = {"logprobs": None, "finish_reason": "length", "stop_reason": None}
_GREETING = [{"role": "system", "content": "Answer in one line."}, {"role": "user", "content": "What is a latent?"}]
_MODEL = {
    "id": _NO_MODEL,
    "object": "model",
    "created": 1750000000,
    "owned_by": "lrt-server",
    "max_model_len": 512,
    "recurrence": {"variant": "layerwise", "source_layer": 5},
}
_TOKENIZER = {
    "tokenizer_class": "tiktoken",
    "vocab_size": 2048,
    "model_max_length": 512,
    "bos_token": "<|bos|>",
    "eos_token": "<|assistant_end|>",
    "pad_token": None,
    "unk_token": None,
    "add_bos_token": True,
    "additional_special_tokens": ["<|bos|>", "<|assistant_end|>"],
    "chat_template": None,
}
_METRICS = '# TYPE lrt:num_requests_running gauge\nlrt:num_requests_running{engine="0",model_name="tiny"} 3.0\n'
_OK = {"status": "ok"}
_PROBE = ("get", "head")

OPERATIONS: dict[str, Operation] = {
    "/v1/completions": Operation(
        "generation",
        "Complete one or several prompts",
        answer=responses.CompletionResponse,
        body=CompletionRequest,
        stream=responses.CompletionResponse,
        examples={
            "text": {"model": _NO_MODEL, "prompt": "def fibonacci(n):", "max_tokens": 48, "temperature": 0},
            "stream": {"model": _NO_MODEL, "prompt": "import ", "max_tokens": 16, "stream": True, "stop": ["\n\n"], "seed": 1},
            "score": {"model": _NO_MODEL, "prompt": [5, 9, 12], "max_tokens": 0, "echo": True, "logprobs": 1},
        },
        example={
            **_HEAD,
            "object": "text_completion",
            "choices": [{"index": 0, "text": "\n    if", **_END}],
            "usage": _USAGE,
        },
        stream_example={**_HEAD, "object": "text_completion", "choices": [{"index": 0, "text": " if", **_END}]},
        statuses=(*_BODY, 429),
        methods=("post",),
    ),
    "/v1/chat/completions": Operation(
        "generation",
        "Answer a conversation",
        answer=responses.ChatResponse,
        body=ChatRequest,
        stream=responses.ChatChunk,
        examples={
            "chat": {"model": _NO_MODEL, "messages": _GREETING, "max_completion_tokens": 32},
            "stream": {"model": _NO_MODEL, "messages": _GREETING[1:], "stream": True, "max_completion_tokens": 32},
            "logprobs": {"messages": _GREETING, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 4},
        },
        example={
            **_HEAD,
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "A state.", "refusal": None}, **_END}],
            "usage": _USAGE,
        },
        stream_example={
            **_HEAD,
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": {"content": " state"}, **_END}],
        },
        statuses=(*_BODY, 429),
        methods=("post",),
    ),
    "/tokenize": Operation(
        "tokens",
        "Token ids of a prompt or of messages",
        answer=responses.TokenizeResponse,
        body=TokenizeRequest,
        examples={
            "prompt": {"prompt": "def f", "return_token_strs": True},
            "messages": {"messages": _GREETING, "add_generation_prompt": True},
        },
        example={"count": 2, "max_model_len": 512, "tokens": [100, 101], "token_strs": ["def", " f"]},
        statuses=_BODY,
        methods=("post",),
    ),
    "/detokenize": Operation(
        "tokens",
        "Text of token ids",
        answer=responses.DetokenizeResponse,
        body=DetokenizeRequest,
        examples={"ids": {"tokens": [100, 101]}},
        example={"prompt": "def f"},
        statuses=_BODY,
        methods=("post",),
    ),
    "/tokenizer_info": Operation("tokens", "What the tokenizer is", answer=responses.TokenizerInfo, example=_TOKENIZER),
    "/v1/models": Operation(
        "models", "Every served name", answer=responses.ModelList, example={"object": "list", "data": [_MODEL]}
    ),
    "/v1/models/{name}": Operation(
        "models",
        "One served name",
        answer=responses.Model,
        example=_MODEL,
        statuses=(404, *_ANY),
        parameters=({"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": _NO_MODEL},),
    ),
    "/live": Operation("probes", "The process answers", answer=responses.Status, example=_OK, statuses=(500,), methods=_PROBE),
    "/ready": Operation("probes", "New requests are taken", answer=responses.Status, example=_OK, methods=_PROBE),
    "/health": Operation(
        "probes",
        "The engine lives and gets on",
        answer=responses.Health,
        example={**_OK, "last_step_age_seconds": 0.0},
        methods=_PROBE,
    ),
    "/version": Operation(
        "numbers",
        "Versions of what answers",
        answer=responses.Versions,
        example={"version": package_version("lrt-server"), "torch": "2.13.0", "python": "3.12.4"},
    ),
    "/load": Operation("numbers", "Requests in flight", answer=responses.Load, example={"server_load": 3}),
    "/metrics": Operation("numbers", "Prometheus' text format", media_type="text/plain", example=_METRICS),
    "/openapi.json": Operation("documents", "This document", answer=responses.OpenAPIDocument),
    "/docs": Operation("documents", "A page that shows this document", media_type="text/html"),
}
"""By path."""


def add_documents(app: FastAPI, service: Service) -> None:
    """Add both routes to `app`."""
    document = _document(service.model_names[0], bool(service.keys))
    page = PAGE.read_bytes()

    @app.get("/openapi.json")
    async def get_document() -> Response:
        """What the routes take and answer."""
        return Response(document, media_type="application/json")

    @app.get("/docs")
    async def get_page() -> Response:
        """The same for people."""
        return Response(page, headers={"content-security-policy": POLICY}, media_type="text/html")


@lru_cache(maxsize=8)
def _document(model_name: str, needs_key: bool) -> bytes:
    """As it is sent: made once, for it takes longer than all the rest of an application."""
    return dump_json(make_document(model_name, needs_key))


def make_document(model_name: str, needs_key: bool = False) -> Schema:
    """The whole document; examples ask for this model. needs_key: all but the probes want an API key."""
    document: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "lrt-server", "version": package_version("lrt-server"), "description": DESCRIPTION},
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": {path: _path(operation) for path, operation in OPERATIONS.items()},
        "components": {"schemas": _schemas()},
    }
    if needs_key:
        _secure(document)
    renamed = _renamed(document, model_name)
    assert isinstance(renamed, dict)
    return renamed


def _secure(document: Schema) -> None:
    """Say where a key is needed, and what comes without."""
    document["components"]["securitySchemes"] = SECURITY_SCHEMES
    document["security"] = [{name: []} for name in SECURITY_SCHEMES]
    for path, methods in document["paths"].items():
        for method, says in methods.items():
            if path in PROBES:
                says["security"] = []
            else:
                says["responses"]["401"] = _refusal(401, method)


def _renamed(value: Any, model_name: str) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, model_name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(item, model_name) for item in value]
    return model_name if value == _NO_MODEL else value


def _path(operation: Operation) -> Schema:
    return {method: _operation(operation, method) for method in operation.methods}


def _operation(operation: Operation, method: str) -> Schema:
    says: Schema = {"tags": [operation.tag], "summary": operation.summary}
    if operation.parameters:
        says["parameters"] = list(operation.parameters)
    if operation.body is not None:
        examples = {name: {"value": value} for name, value in operation.examples.items()}
        content = {"schema": _reference(operation.body), "examples": examples}
        says["requestBody"] = {"required": True, "content": {"application/json": content}}
    answers: Schema = {"200": {"description": operation.summary}}
    if method != "head":
        answers["200"]["content"] = _content(operation)
    answers.update((str(status), _refusal(status, method)) for status in sorted(operation.statuses))
    return {**says, "responses": answers}


def _refusal(status: int, method: str) -> Schema:
    content = {"application/json": {"schema": _reference(responses.Error)}}
    return {"description": REFUSALS[status], **({} if method == "head" else {"content": content})}


def _content(operation: Operation) -> Schema:
    schema = {"type": "string"} if operation.answer is None else _reference(operation.answer)
    content: Schema = {operation.media_type: {"schema": schema}}
    if operation.example is not None:
        content[operation.media_type]["example"] = operation.example
    if operation.stream is not None:
        text = f"Events `data: JSON`, each a {operation.stream.__name__} or an Error, and a last one `data: [DONE]`."
        event = {"anyOf": [_reference(operation.stream), _reference(responses.Error)]}
        assert operation.stream_example is not None
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": text},
            "x-event": event,
            "example": f"data: {dump_json(operation.stream_example).decode()}\n\ndata: [DONE]\n\n",
        }
    return content


def _reference(model: type[BaseModel]) -> Schema:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _schemas() -> Schema:
    answers = {model for item in OPERATIONS.values() for model in (item.answer, item.stream) if model is not None}
    ordered: list[type[BaseModel]] = [*_REQUESTS, responses.Error, *sorted(answers, key=lambda model: model.__name__)]
    _, definitions = models_json_schema(
        [(model, "validation") for model in ordered], ref_template="#/components/schemas/{model}"
    )
    schemas: Schema = definitions["$defs"]
    _drop_titles(schemas)
    for model in _NULLABLE:
        _describe(schemas[model.__name__])
    return schemas


def _describe(schema: Schema) -> None:
    """Say of a request what its fields mean, that null counts as absent, whatever the name, and that no others are known."""
    schema["additionalProperties"] = _NULL
    for name, inner in schema["properties"].items():
        outer = {"description": DESCRIPTIONS[name]} if name in DESCRIPTIONS else {}
        if name not in schema.get("required", ()):
            default = inner.pop("default", None)
            outer |= {} if default is None else {"default": default}
            choices = inner.get("anyOf", [inner])
            inner = {"anyOf": [*(choice for choice in choices if choice != _NULL), _NULL]}
        schema["properties"][name] = {**inner, **outer}


def _drop_titles(value: Any) -> None:
    """Pydantic gives every field a title that repeats its name."""
    if isinstance(value, dict):
        if isinstance(value.get("title"), str):
            del value["title"]
        for item in value.values():
            _drop_titles(item)
    elif isinstance(value, list):
        for item in value:
            _drop_titles(item)
