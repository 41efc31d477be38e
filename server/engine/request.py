"""What a caller hands to the engine and what it gets back: plain frozen data, the seam between HTTP and engine.

Neighbours: `async_engine.py` takes a `GenerationRequest` and yields `Delta`s; `server/api` builds and reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lrt_core.grammar import Grammar
from lrt_core.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


class RequestError(ValueError):
    """A request that this engine can never serve; the message says why, `param` which field is at fault."""

    def __init__(self, message: str, param: str = "prompt") -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(RequestError):
    """The prompt does not fit the model's maximum context length."""


class AdmissionError(RuntimeError):
    """The engine takes no more requests now; `reason` is `queue_full`, `draining` or `engine_dead`."""

    def __init__(self, reason: Literal["queue_full", "draining", "engine_dead"], message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class StoppingParams:
    """When a sample ends. max_tokens counts generated tokens (0: the prompt is read and nothing generated); stop strings
    match across token borders and are cut from the text; an end-of-sequence id ends it unless ignore_eos."""

    max_tokens: int
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and `n` samples of it (sample i uses seed + i).

    logprobs, prompt_logprobs: None for none, else how many alternatives to report beside each token's own logprob.
    priority: lower values are served first. cache_salt: cached blocks are shared only among requests of equal salt.
    grammar: what every sample has to match; where it is complete, an end-of-sequence id may end the sample. Of a sample that
    ignores those ids (or a model that has none) the end is where nothing can follow.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stopping: StoppingParams
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    grammar: Grammar | None = None


class TokenLogprob(NamedTuple):
    """A token's own log-probability (natural log, of the unmodified model distribution; None for a first prompt token) and
    the likeliest alternatives, (id, logprob), falling."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Delta:
    """What is new of sample `index`: text (whole characters, never part of a stop string), ids, and once finished the reason.

    token_ids counts every generated token, an end-of-sequence id included (its text is empty). logprobs has one entry per
    token id when asked for. prompt_logprobs comes once, with the first delta of each sample, when asked for.
    stop_reason: the stop string that ended the sample; None for an end-of-sequence id or the length.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    num_cached_tokens: int = 0
