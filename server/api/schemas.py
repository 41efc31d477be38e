"""The fields of a completion request: their types, bounds and defaults. Nothing is ignored in silence.

A field that is documented but not built, or unknown, is refused by name; null counts as absent.
Neighbours: `body.py` hands over the parsed JSON, `completions.py` turns the result into engine requests.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from lrt_core.sampling_params import SamplingParams
from server.api.errors import ApiError, bad_request
from server.api.structured import ResponseFormat, StructuredOutputs, structure_conflicts
from server.engine.request import StoppingParams

MAX_SAMPLES = 128
MAX_CHOICES = 1024
"""Bounds of `n`, and of n times the prompts of one request."""
MAX_LOGPROBS = 20
MAX_STOPS = 1024
MAX_PROBLEMS = 10
INT64 = 2**63

NOT_BUILT = frozenset(
    {
        *("min_tokens", "stop_token_ids", "include_stop_str_in_output", "best_of", "min_p", "add_special_tokens"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words"),
        *("prompt_logprobs", "suffix", "priority", "cache_salt"),
        *("truncate_prompt_tokens", "user", "request_id", "latents", "stream_options.continuous_usage_stats"),
    }
)
"""Documented parameters that this server refuses, whether or not unknown ones are tolerated."""

_INPUT = reprlib.Repr()
_INPUT.maxstring = _INPUT.maxother = _INPUT.maxlong = 60


def _valid_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"contains a lone surrogate at character {error.start}") from None
    return text


def _is_ids(value: object) -> bool:
    return type(value) is list and bool(value) and set(map(type, value)) == {int}


def _parse_prompt(value: object) -> tuple[str, ...] | tuple[tuple[int, ...], ...]:
    """One or several prompts, all texts or all lists of ids. Raises ValueError."""
    if isinstance(value, str):
        return (_valid_text(value),)
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    if not value:
        raise ValueError("must not be empty")
    if _is_ids(value):
        return (tuple(value),)
    if all(isinstance(item, str) for item in value):
        return tuple(map(_valid_text, value))
    if any(item == [] for item in value):
        raise ValueError("contains an empty list of token ids")
    if not all(map(_is_ids, value)):
        raise ValueError("must hold strings only, integer token ids only, or non-empty lists of integer token ids only")
    return tuple(map(tuple, value))


def _parse_stop(value: object) -> tuple[str, ...]:
    stop = [value] if isinstance(value, str) else value
    if not isinstance(stop, list) or not all(isinstance(item, str) for item in stop):
        raise ValueError("must be a string or a list of strings")
    if "" in stop:
        raise ValueError("must not contain an empty string")
    if len(stop) > MAX_STOPS:
        raise ValueError(f"must not hold more than {MAX_STOPS} strings")
    return tuple(map(_valid_text, stop))


def _without_nulls(value: object) -> object:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


Prompts = Annotated[tuple[str, ...] | tuple[tuple[int, ...], ...], PlainValidator(_parse_prompt)]
Text = Annotated[str, AfterValidator(_valid_text)]


class StreamOptions(BaseModel):
    """What a stream carries besides its text. Foreign keys are judged by `parse_fields`, not here."""

    model_config = ConfigDict(strict=True, frozen=True)
    include_usage: bool = False


class GenerationFields(BaseModel):
    """What every generating route takes; defaults are OpenAI's. Without `model` the one served answers."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=0)] = 16
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    stop: Annotated[tuple[str, ...], PlainValidator(_parse_stop)] = ()
    ignore_eos: bool = False
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    return_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: Annotated[StreamOptions, BeforeValidator(_without_nulls)] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, vocab_size: int) -> SamplingParams:
        """How the samples are drawn."""
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, top_k=min(self.top_k, vocab_size), seed=self.seed)

    def stopping_params(self, room: int) -> StoppingParams:
        """When the samples end; room: tokens that the context holds behind the prompt."""
        return StoppingParams(min(self.max_tokens, room), self.ignore_eos, self.stop)

    def conflicts(self) -> list[tuple[str, str]]:
        """Fields that are valid alone but not together: (field, message)."""
        problems = structure_conflicts(self.response_format, self.structured_outputs)
        if self.stream_options is not None and not self.stream:
            problems.append(("stream_options", "is allowed only with stream"))
        return problems


class CompletionRequest(GenerationFields):
    """A valid body of POST /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False

    def conflicts(self) -> list[tuple[str, str]]:
        """See the base class."""
        problems = super().conflicts()
        if self.max_tokens == 0 and not self.echo:
            problems.append(("max_tokens", "may be 0 only with echo"))
        if self.n * len(self.prompt) > MAX_CHOICES:
            problems.append(("prompt", f"makes more than {MAX_CHOICES} choices: {len(self.prompt)} prompts times n = {self.n}"))
        return problems


FieldsT = TypeVar("FieldsT", bound=GenerationFields)


def parse_fields(kind: type[FieldsT], data: Mapping[str, Any], lenient: bool = False) -> tuple[FieldsT, list[str]]:
    """The request of this kind in `data`, and the unknown fields that were dropped (none unless `lenient`). Raises ApiError."""
    unknown, problems = _foreign_fields(kind, data, lenient)
    fields = {key: value for key, value in data.items() if key in kind.model_fields and value is not None}
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        problems += _problems(error)
    else:
        problems += request.conflicts()
    if problems:
        raise _refusal(problems)
    return request, unknown


def _foreign_fields(
    kind: type[GenerationFields], data: Mapping[str, Any], lenient: bool
) -> tuple[list[str], list[tuple[str, str]]]:
    """Names that are set but not ours: those to drop, and problems (field, message) for those to refuse."""
    names = [key for key, value in data.items() if value is not None and key not in kind.model_fields]
    options = data.get("stream_options")
    if isinstance(options, dict):
        known = StreamOptions.model_fields
        names += [f"stream_options.{key}" for key, value in options.items() if value is not None and key not in known]
    problems = [(name, "is not supported by this server") for name in names if name in NOT_BUILT]
    unknown = [name for name in names if name not in NOT_BUILT]
    if lenient:
        return unknown, problems
    return [], problems + [(name[:100], "is not a known field") for name in unknown]


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    problems = []
    for item in error.errors(include_url=False, include_context=False):
        name = ".".join(map(str, item["loc"]))
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if item["type"] == "missing":
            problems.append((name, "is required"))
        else:
            problems.append((name, f"{message}, got {_INPUT.repr(item['input'])}"))
    return problems


def _refusal(problems: list[tuple[str, str]]) -> ApiError:
    listed = "; ".join(f"'{name}' {message}" for name, message in problems[:MAX_PROBLEMS])
    more = len(problems) - MAX_PROBLEMS
    return bad_request(listed + (f"; and {more} more" if more > 0 else ""), param=problems[0][0])
