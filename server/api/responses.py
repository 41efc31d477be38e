"""The shapes of responses, for the OpenAPI document: tests hold what the routes answer against them.

Neighbours: `openapi.py` writes them down; `choices.py`, `chat_choices.py` and the routes make the real things.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "abort"]


class ErrorDetail(BaseModel):
    """What went wrong; param names the field at fault, code is a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every refusal and failure looks like this, inside streams too."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those whose state was cached."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """A column per kind, an entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """Of a token at its place in the prompt; rank: its place among all by likelihood, from 1."""

    logprob: float
    rank: int
    decoded_token: str


class Latents(BaseModel):
    """Latents, row by row; data: their little-endian numbers in base64."""

    dtype: Literal["float32"]
    shape: list[int]
    data: str


class Extras(BaseModel):
    """What a choice has when asked for; error: why it was aborted while others went on. In a stream what is about the prompt
    comes in a choice's first chunk, latents and error in its last."""

    token_ids: list[int] = []
    prompt_token_ids: list[int] = []
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    latents: Latents | None = None
    error: ErrorDetail | None = None


class CompletionChoice(Extras):
    """One completion of one prompt; index = prompt * n + sample."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class Answer(BaseModel):
    """What answers of generating routes begin with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class CompletionResponse(Answer):
    """A completion; in a stream each chunk has this shape, without usage but in the last one if asked for."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessage(BaseModel):
    """The assistant's answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatTokenLogprob(BaseModel):
    """A token; bytes of a token that is part of a character are no text of their own."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprobEntry(ChatTokenLogprob):
    """A generated token and the likeliest in its place."""

    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(BaseModel):
    """An entry per generated token."""

    content: list[ChatLogprobEntry]
    refusal: None


class ChatChoice(Extras):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatResponse(Answer):
    """A chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What is new: the role first, then text, then nothing."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Extras):
    """What is new of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class ChatChunk(Answer):
    """A chunk of a stream; the last one has no choices, but usage if asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TokenizeResponse(BaseModel):
    """Ids; token_strs when asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    """Text."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What the tokenizer is, in words that Hugging Face's have for it."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    add_bos_token: bool
    additional_special_tokens: list[str]
    chat_template: str | None


class RecurrenceInfo(BaseModel):
    """Which layer's output becomes the memory, and how it enters."""

    variant: str
    source_layer: int


class Model(BaseModel):
    """A served name; recurrence is null for a plain transformer."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    recurrence: RecurrenceInfo | None


class ModelList(BaseModel):
    """Every served name."""

    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    """All is well."""

    status: Literal["ok"]


class Health(Status):
    """The engine gets on; the age is 0 while it has nothing to do."""

    last_step_age_seconds: float


class Versions(BaseModel):
    """Of what answers."""

    version: str
    torch: str
    python: str


class Load(BaseModel):
    """Requests in flight."""

    server_load: int


class OpenAPIDocument(BaseModel):
    """This document."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
