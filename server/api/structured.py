"""What a request may say about the form of its output: `response_format` as OpenAI has it, `structured_outputs` as vLLM has it.

Both become the source of one grammar, which the engine compiles. Neighbours: `schemas.py` holds the two fields,
`completions.py` asks for the grammar before it queues a request, `lrt_core/grammar.py` says what the sources are.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from lrt_core.grammar import Grammar, GrammarError, GrammarKind, GrammarSource
from server.api.errors import bad_request
from server.api.values import valid_text
from server.engine.async_engine import AsyncEngine

MAX_NAME = 64
ANY_OBJECT = {"type": "object"}
_STRICT = ConfigDict(strict=True, frozen=True, extra="forbid")
Schema = dict[str, Any]


def _parse_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return valid_text(value)


def _parse_choice(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise ValueError("must be a list of strings, at least one, none of them empty")
    return tuple(map(valid_text, value))


def _parse_schema(value: object) -> Schema:
    """A JSON schema, or the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON schema: an object")
    return value


class JsonSchema(BaseModel):
    """OpenAI's wrapping of a schema. Whether `strict` or not, the output matches it; name and description are the client's."""

    model_config = _STRICT
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    definition: Annotated[Schema, PlainValidator(_parse_schema), Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Plain text, any JSON object, or JSON that matches a schema."""

    model_config = _STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self

    def wanted(self) -> tuple[str, GrammarKind, str] | None:
        """Field, kind and source of the grammar; None for plain text."""
        if self.json_schema is not None:
            return "response_format.json_schema.schema", "json", _schema_text(self.json_schema.definition)
        return ("response_format", "json", _schema_text(ANY_OBJECT)) if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """Exactly one of a JSON schema, a regular expression, a list of texts and a grammar; the whole output matches it."""

    model_config = _STRICT
    # The alias, because a model's own method has the name.
    definition: Annotated[Schema | None, PlainValidator(_parse_schema), Field(alias="json")] = None
    regex: Annotated[str | None, PlainValidator(_parse_text)] = None
    choice: Annotated[tuple[str, ...] | None, PlainValidator(_parse_choice)] = None
    grammar: Annotated[str | None, PlainValidator(_parse_text)] = None

    @model_validator(mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = {key: item for key, item in value.items() if item is not None}
        if sum(name in given for name in ("json", "regex", "choice", "grammar")) != 1:
            raise ValueError("must hold exactly one of json, regex, choice and grammar")
        return given

    def wanted(self) -> tuple[str, GrammarKind, str]:
        """Field, kind and source of the grammar."""
        if self.definition is not None:
            return "structured_outputs.json", "json", _schema_text(self.definition)
        if self.choice is not None:
            return "structured_outputs.choice", "choice", json.dumps(self.choice, ensure_ascii=False)
        if self.regex is not None:
            return "structured_outputs.regex", "regex", self.regex
        assert self.grammar is not None
        return "structured_outputs.grammar", "grammar", self.grammar


def structure_conflicts(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> list[tuple[str, str]]:
    """Problems, (field, message), of the two together."""
    if structured_outputs is not None and response_format is not None and response_format.type != "text":
        return [("structured_outputs", "cannot be combined with response_format")]
    return []


async def compile_grammar(
    engine: AsyncEngine, response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> Grammar | None:
    """The grammar that the two fields ask for, or None. Raises ApiError (400) for one that cannot be followed."""
    form = structured_outputs or response_format
    wanted = form.wanted() if form is not None else None
    if wanted is None:
        return None
    origin, kind, text = wanted
    try:
        return await engine.compile(GrammarSource(kind, text, origin))
    except GrammarError as error:
        raise bad_request(f"'{origin}' cannot be used: {error}", param=origin) from None


def _schema_text(schema: Schema) -> str:
    """Schemas that differ in nothing but blanks have one text; the order of their properties counts."""
    return json.dumps(schema, separators=(",", ":"))
