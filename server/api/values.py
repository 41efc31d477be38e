"""Values of request fields whose type says too little: functions that check them, and what the documents say of them.

Neighbour: `schemas.py` declares the fields.
"""

from __future__ import annotations

import re
import reprlib
from typing import Annotated

from pydantic import AfterValidator, Field, PlainValidator, ValidationInfo

MAX_LOGPROBS = 20
"""Bound of `logprobs` and `prompt_logprobs` unless the server is told another."""
MAX_STRINGS = 1024
MAX_CHARACTERS = 2**16
"""Bounds of a list of stop strings or bad words: how many, and how long together."""
MAX_STOP_IDS = 1024
MAX_NAME = 512
"""Characters of `user` and `cache_salt`."""
REQUEST_ID = "^[A-Za-z0-9_.:-]{1,128}$"

INPUT = reprlib.Repr()
INPUT.maxstring = INPUT.maxother = INPUT.maxlong = 60


def valid_text(text: str) -> str:
    """The text; ValueError if it cannot be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"contains a lone surrogate at character {error.start}") from None
    return text


def _is_ids(value: object) -> bool:
    return type(value) is list and bool(value) and set(map(type, value)) == {int}


def parse_prompt(value: object) -> tuple[str, ...] | tuple[tuple[int, ...], ...]:
    """One or several prompts, all texts or all lists of ids. Raises ValueError."""
    if isinstance(value, str):
        return (valid_text(value),)
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    if not value:
        raise ValueError("must not be empty")
    if _is_ids(value):
        return (tuple(value),)
    if all(isinstance(item, str) for item in value):
        return tuple(map(valid_text, value))
    if any(item == [] for item in value):
        raise ValueError("contains an empty list of token ids")
    if not all(map(_is_ids, value)):
        raise ValueError("must hold strings only, integer token ids only, or non-empty lists of integer token ids only")
    return tuple(map(tuple, value))


def parse_stop(value: object) -> tuple[str, ...]:
    return _parse_strings([value] if isinstance(value, str) else value, "must be a string or a list of strings")


def parse_words(value: object) -> tuple[str, ...]:
    return _parse_strings(value, "must be a list of strings")


def _parse_strings(value: object, kind: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(kind)
    if "" in value:
        raise ValueError("must not contain an empty string")
    if len(value) > MAX_STRINGS or sum(map(len, value)) > MAX_CHARACTERS:
        raise ValueError(f"must not hold more than {MAX_STRINGS} strings or {MAX_CHARACTERS} characters in all")
    return tuple(map(valid_text, value))


def parse_ids(value: object) -> tuple[int, ...]:
    """Different ids in order. Raises ValueError."""
    if value != [] and not _is_ids(value):
        raise ValueError("must be a list of integer token ids")
    assert isinstance(value, list)
    return tuple(dict.fromkeys(value))


def parse_tokens(value: object) -> tuple[int, ...]:
    """Ids, of which any may come again. Raises ValueError."""
    if value != [] and not _is_ids(value):
        raise ValueError("must be a list of integer token ids")
    assert isinstance(value, list)
    wrong = next((id for id in value if id < 0), None)
    if wrong is not None:
        raise ValueError(f"must hold ids of at least 0, not {INPUT.repr(wrong)}")
    return tuple(value)


def parse_stop_ids(value: object) -> tuple[int, ...]:
    ids = parse_ids(value)
    if len(ids) > MAX_STOP_IDS:
        raise ValueError(f"must not hold more than {MAX_STOP_IDS} ids")
    return ids


def parse_allowed(value: object) -> tuple[int, ...]:
    ids = parse_ids(value)
    if not ids:
        raise ValueError("must not be empty")
    return ids


def parse_bias(value: object) -> dict[int, float]:
    """Numbers by token id, which JSON's keys say in digits. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of numbers by token id")
    wrong = next((key for key in value if not re.fullmatch("0|[1-9][0-9]{0,17}", key, re.ASCII)), None)
    if wrong is not None:
        raise ValueError(f"must have token ids as keys, not {INPUT.repr(wrong)}")
    for bias in value.values():
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("must have numbers from -100 to 100 as values")
    return {int(key): float(bias) for key, bias in value.items()}


def _check_request_id(text: str) -> str:
    if not is_request_id(text):
        raise ValueError("must be 1 to 128 letters, digits and any of . _ : -")
    return text


def is_request_id(text: str) -> bool:
    """Whether a client may name its request so."""
    return re.fullmatch(REQUEST_ID, text, re.ASCII) is not None


def _check_logprobs(value: int, info: ValidationInfo) -> int:
    limit = (info.context or {}).get("max_logprobs", MAX_LOGPROBS)
    if value > limit:
        raise ValueError(f"should be less than or equal to {limit}")
    return value


def check_not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("should be at least 1, or -1 for as many as fit")
    return value


SomeText = Annotated[str, Field(min_length=1)]
Id = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Id], Field(min_length=1)]
PromptInput = SomeText | Annotated[list[SomeText], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
WordsInput = Annotated[list[SomeText], Field(max_length=MAX_STRINGS)]
StopInput = SomeText | WordsInput
StopIdsInput = Annotated[list[Id], Field(max_length=MAX_STOP_IDS)]
BiasInput = dict[Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,17})$")], Annotated[float, Field(ge=-100, le=100)]]
"""What the documents say of fields that a function checks."""
Prompts = Annotated[tuple[str, ...] | tuple[tuple[int, ...], ...], PlainValidator(parse_prompt, PromptInput)]
Text = Annotated[str, AfterValidator(valid_text)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(valid_text)]
RequestId = Annotated[Text, AfterValidator(_check_request_id), Field(json_schema_extra={"pattern": REQUEST_ID})]
NumLogprobs = Annotated[int, Field(ge=0, json_schema_extra={"maximum": MAX_LOGPROBS}), AfterValidator(_check_logprobs)]
"""How many logprobs to report beside a token's own, up to what the server allows (`parse_fields`)."""
