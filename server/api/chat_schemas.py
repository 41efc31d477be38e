"""The fields of a chat completion request, and the messages that other routes take too.

Neighbours: `schemas.py` has what all requests share and judges unknown fields, `chat.py` renders and answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from lrt_core.chat import MAX_MESSAGES
from server.api.schemas import INT64, NOT_BUILT, GenerationFields, RequestFields, without_nulls
from server.api.values import NumLogprobs, valid_text
from server.engine.request import StoppingParams

UNBOUNDED = INT64 - 1
"""Stands for as many tokens as the context holds."""
CHAT_NOT_BUILT = frozenset(
    {
        *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "modalities", "audio", "prediction"),
        *("reasoning_effort", "verbosity", "web_search_options", "store", "metadata", "service_tier"),
        *("prompt_cache_key", "safety_identifier"),
        *("chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs", "echo"),
        *("best_of", "add_special_tokens", "allow_special", "truncate_prompt_tokens"),
    }
)
"""Parameters of chats elsewhere that this server refuses, beside those of every route."""


class TextPart(BaseModel):
    """A part of a message; what it says in the documents, for `_parse_content` checks it."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


def _parse_content(value: object) -> str:
    """A message's text: a string, or the texts of its parts, a line each. Raises ValueError."""
    if isinstance(value, str):
        return valid_text(value)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of text parts")
    return "\n".join(_parse_part(index, part) for index, part in enumerate(value))


def _parse_part(index: int, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise ValueError(f"has a part of type {kind[:40]!r} at {index}: text parts only, this server reads nothing else")
    if not isinstance(part, dict) or kind is None or not isinstance(part.get("text"), str):
        raise ValueError(f'must hold parts like {{"type": "text", "text": "..."}}; the one at {index} is none')
    foreign = next((key for key, item in part.items() if key not in ("type", "text") and item is not None), None)
    if foreign is not None:
        raise ValueError(f"has {foreign[:100]!r} in the part at {index}, which is not supported by this server")
    return valid_text(part["text"])


def _refuse_tools(value: object) -> object:
    if value in ("tool", "function"):
        raise ValueError("is not supported by this server: it has no tools")
    return value


class Message(BaseModel):
    """One message of a conversation. Anything but role and content is refused; null counts as absent."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_refuse_tools)]
    content: Annotated[str, PlainValidator(_parse_content, str | Annotated[list[TextPart], Field(min_length=1)])]

    def for_template(self) -> dict[str, str]:
        """As templates know it: the developer's messages are what was called the system's."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


Messages = Annotated[list[Annotated[Message, BeforeValidator(without_nulls)]], Field(min_length=1, max_length=MAX_MESSAGES)]


class RenderingFields(RequestFields):
    """How a conversation ends: with what opens the assistant's turn, or inside its last message."""

    not_built: ClassVar[frozenset[str]] = NOT_BUILT | CHAT_NOT_BUILT
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def opens_turn(self) -> bool:
        """Whether the assistant's turn is opened; a message that is continued needs none."""
        return self.add_generation_prompt and not self.continue_final_message

    def conflicts(self) -> list[tuple[str, str]]:
        """See the base class."""
        problems = super().conflicts()
        if self.continue_final_message and self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
            problems.append(("continue_final_message", "excludes add_generation_prompt"))
        return problems


class ChatRequest(RenderingFields, GenerationFields):
    """A valid body of POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, json_schema_extra=lambda schema: schema.pop("default"))] = UNBOUNDED
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: NumLogprobs | None = None

    def stopping_params(self, room: int) -> StoppingParams:
        """See the base class; without a bound the context's end is one."""
        return super().stopping_params(min(room, self.max_completion_tokens or UNBOUNDED))

    def conflicts(self) -> list[tuple[str, str]]:
        """See the base class."""
        problems = super().conflicts()
        if self.top_logprobs is not None and not self.logprobs:
            problems.append(("top_logprobs", "is allowed only with logprobs"))
        bounds = {self.max_tokens, self.max_completion_tokens} - {UNBOUNDED, None}
        if len(bounds) > 1:
            problems.append(("max_tokens", "and max_completion_tokens mean the same and must not differ"))
        return problems


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a chat template takes them."""
    return [message.for_template() for message in messages]
