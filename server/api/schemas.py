"""The fields of a completion request: their types, bounds and defaults. Nothing is ignored in silence.

A field that is documented but not built, or unknown, is refused by name; null counts as absent.
Neighbours: `body.py` hands over the parsed JSON, `completions.py` turns the result into engine requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from lrt_core.grammar import Grammar
from lrt_core.sampling_params import SamplingParams
from lrt_core.tokenizer import Tokenizer, TokenizerError
from server.api.errors import ApiError, bad_request
from server.api.structured import ResponseFormat, StructuredOutputs, structure_conflicts
from server.api.values import (
    INPUT,
    MAX_LOGPROBS,
    BiasInput,
    Ids,
    Name,
    NumLogprobs,
    Prompts,
    RequestId,
    StopIdsInput,
    StopInput,
    Text,
    WordsInput,
    check_not_zero,
    parse_allowed,
    parse_bias,
    parse_stop,
    parse_stop_ids,
    parse_words,
)
from server.engine.request import GenerationRequest, LatentsWanted, StoppingParams

MAX_SAMPLES = 128
MAX_CHOICES = 1024
"""Bounds of `n` and `best_of`, and of either times the prompts of one request."""
MAX_PROBLEMS = 10
INT64 = 2**63

REFUSED = {"suffix": "is not supported: a model that only continues text cannot fill in what comes before a suffix"}
NOT_BUILT: frozenset[str] = frozenset()
"""Documented parameters that this server refuses, whether or not unknown ones are tolerated; REFUSED says why."""


def without_nulls(value: object) -> object:
    """An object without what is null, which counts as absent."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class StreamOptions(BaseModel):
    """What a stream carries besides its text. Foreign keys are judged by `parse_fields`, not here."""

    model_config = ConfigDict(strict=True, frozen=True)
    include_usage: bool = False
    continuous_usage_stats: bool = False


class RequestFields(BaseModel):
    """What every route with a body takes. Without `model` the one served answers."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    not_built: ClassVar[frozenset[str]] = NOT_BUILT
    """Parameters that others' servers have here and that are refused, whether or not unknown ones are tolerated."""
    model: Text | None = None

    def conflicts(self) -> list[tuple[str, str]]:
        """Fields that are valid alone but not together: (field, message)."""
        return []


class GenerationFields(RequestFields):
    """What every generating route takes; defaults are OpenAI's."""

    max_tokens: Annotated[int, Field(ge=0)] = 16
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[dict[int, float], PlainValidator(parse_bias, BiasInput)] = Field(default_factory=dict)
    allowed_token_ids: Annotated[tuple[int, ...], PlainValidator(parse_allowed, Ids)] | None = None
    bad_words: Annotated[tuple[str, ...], PlainValidator(parse_words, WordsInput)] = ()
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    stop: Annotated[tuple[str, ...], PlainValidator(parse_stop, StopInput)] = ()
    stop_token_ids: Annotated[tuple[int, ...], PlainValidator(parse_stop_ids, StopIdsInput)] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    prompt_logprobs: NumLogprobs | None = None
    return_token_ids: bool = False
    latents: LatentsWanted | None = None
    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] = 0
    cache_salt: Name | None = None
    user: Name | None = None
    request_id: RequestId | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: Annotated[StreamOptions, BeforeValidator(without_nulls)] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream says the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling_params(self, tokenizer: Tokenizer) -> SamplingParams:
        """How the samples are drawn. Raises ApiError for bad words that cannot be tokenised."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=min(self.top_k, tokenizer.vocab_size),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            allowed_token_ids=self.allowed_token_ids,
            bad_words=_bad_words(self.bad_words, tokenizer),
            seed=self.seed,
        )

    def stopping_params(self, room: int) -> StoppingParams:
        """When the samples end; room: tokens that the context holds behind the prompt."""
        return StoppingParams(
            min(self.max_tokens, room),
            self.ignore_eos,
            self.stop,
            self.stop_token_ids,
            self.min_tokens,
            self.include_stop_str_in_output,
        )

    def generation_request(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        max_model_len: int,
        *,
        num_samples: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
        grammar: Grammar | None = None,
    ) -> GenerationRequest:
        """What the engine is asked for, for one prompt. sampling: of `sampling_params`, the same for all prompts; logprobs and
        prompt_logprobs: as the engine is to report them, which may be more than the client asked for."""
        return GenerationRequest(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            stopping=self.stopping_params(max_model_len - len(prompt_ids)),
            n=num_samples,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            priority=self.priority,
            cache_salt=self.cache_salt,
            latents=self.latents,
            grammar=grammar,
        )

    def conflicts(self) -> list[tuple[str, str]]:
        """See the base class."""
        problems = super().conflicts()
        if self.stream_options is not None and not self.stream:
            problems.append(("stream_options", "is allowed only with stream"))
        problems += structure_conflicts(self.response_format, self.structured_outputs)
        if self.min_tokens > self.max_tokens:
            problems.append(("min_tokens", f"is {self.min_tokens}, more than max_tokens, which is {self.max_tokens}"))
        return problems


def _bad_words(words: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The ids of every word, as it stands and behind a space. Raises ApiError."""
    texts = [text for word in words for text in (word, f" {word}")]
    try:
        return tuple(dict.fromkeys(tuple(tokenizer.encode(text, add_bos=False)) for text in texts))
    except TokenizerError as error:
        raise bad_request(f"'bad_words' cannot be tokenised: {error}", param="bad_words") from None


class CompletionRequest(GenerationFields):
    """A valid body of POST /v1/completions."""

    prompt: Prompts
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    logprobs: NumLogprobs | None = None
    echo: bool = False
    add_special_tokens: bool | None = None
    allow_special: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1), AfterValidator(check_not_zero)] | None = None

    @property
    def num_samples(self) -> int:
        """Samples generated for each prompt, of which the best `n` are answered."""
        return self.n if self.best_of is None else self.best_of

    def conflicts(self) -> list[tuple[str, str]]:
        """See the base class."""
        problems = super().conflicts()
        if self.max_tokens == 0 and not self.echo:
            problems.append(("max_tokens", "may be 0 only with echo"))
        if self.num_samples < self.n:
            problems.append(("best_of", f"is {self.best_of}, less than n, which is {self.n}"))
        if self.num_samples > self.n and self.stream:
            problems.append(("best_of", "may not be more than n with stream: the best are known only at the end"))
        num_choices = self.num_samples * len(self.prompt)
        if num_choices > MAX_CHOICES:
            told = f"{len(self.prompt)} prompts times {self.num_samples} samples"
            problems.append(("prompt", f"makes more than {MAX_CHOICES} choices: {told}"))
        return problems


FieldsT = TypeVar("FieldsT", bound=RequestFields)


def parse_fields(
    kind: type[FieldsT], data: Mapping[str, Any], lenient: bool = False, max_logprobs: int = MAX_LOGPROBS
) -> tuple[FieldsT, list[str]]:
    """The request of this kind in `data`, and the unknown fields that were dropped (none unless `lenient`). Raises ApiError."""
    unknown, problems = _foreign_fields(kind, data, lenient)
    fields = {key: value for key, value in data.items() if key in kind.model_fields and value is not None}
    try:
        request = kind.model_validate(fields, context={"max_logprobs": max_logprobs})
    except ValidationError as error:
        problems += _problems(error)
    else:
        problems += request.conflicts()
    if problems:
        raise _refusal(problems)
    return request, unknown


def _foreign_fields(
    kind: type[RequestFields], data: Mapping[str, Any], lenient: bool
) -> tuple[list[str], list[tuple[str, str]]]:
    """Names that are set but not ours: those to drop, and problems (field, message) for those to refuse."""
    names = [key for key, value in data.items() if value is not None and key not in kind.model_fields]
    options = data.get("stream_options")
    if isinstance(options, dict) and "stream_options" in kind.model_fields:
        known = StreamOptions.model_fields
        names += [f"stream_options.{key}" for key, value in options.items() if value is not None and key not in known]
    refused = {**dict.fromkeys(kind.not_built, "is not supported by this server"), **REFUSED}
    problems = [(name, refused[name]) for name in names if name in refused]
    unknown = [name for name in names if name not in refused]
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
        elif item["type"] == "extra_forbidden":
            problems.append((name, "is not supported by this server"))
        else:
            problems.append((name, f"{message}, got {INPUT.repr(item['input'])}"))
    return problems


def _refusal(problems: list[tuple[str, str]]) -> ApiError:
    listed = "; ".join(f"'{name}' {message}" for name, message in problems[:MAX_PROBLEMS])
    more = len(problems) - MAX_PROBLEMS
    return bad_request(listed + (f"; and {more} more" if more > 0 else ""), param=problems[0][0])
