"""What a caller hands to the engine and what it gets back: plain frozen data, the seam between HTTP and engine.

Neighbours: `async_engine.py` takes a `GenerationRequest` and yields `Delta`s; `server/api` builds and reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lrt_core.grammar import Grammar
from lrt_core.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]
LatentsWanted = Literal["last", "all"]


class RequestError(ValueError):
    """A request that this engine can never serve; the message says why, `param` which field is at fault."""

    def __init__(self, message: str, param: str = "prompt") -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(RequestError):
    """The prompt does not fit the model's maximum context length."""


class NotFiniteError(RuntimeError):
    """The model's states came to be no numbers: a fault of the checkpoint, or of its type, not of the request."""


class AdmissionError(RuntimeError):
    """The engine takes no more requests now; `reason` is `queue_full`, `draining` or `engine_dead`."""

    def __init__(self, reason: Literal["queue_full", "draining", "engine_dead"], message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class StoppingParams:
    """When a sample ends. max_tokens counts generated tokens (0: the prompt is read and nothing generated); stop strings
    match across token borders; an end-of-sequence id ends it unless ignore_eos, an id of stop_token_ids always.

    The first min_tokens tokens are none of those ids, and a stop string that is complete before there are so many ends
    nothing. What ended the sample is cut from its text, unless include_stop says otherwise; its token stays among the ids.
    """

    max_tokens: int
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    include_stop: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and `n` samples of it (sample i uses seed + i).

    logprobs, prompt_logprobs: None for none, else how many alternatives to report beside each token's own logprob.
    priority: lower values are served first. cache_salt: cached blocks are shared only among requests of equal salt.
    latents: which to hand over with each sample's last delta: of the last computed token, or of all; None for none.
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
    latents: LatentsWanted | None = None
    grammar: Grammar | None = None


class TokenLogprob(NamedTuple):
    """A token's own log-probability (natural log, of the unmodified model distribution; None for a first prompt token), the
    likeliest alternatives, (id, logprob), falling, and, of a prompt token, its place among all by likelihood, from 1."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(slots=True)
class Delta:
    """What is new of sample `index`: text (whole characters, never part of a stop string), ids, and once finished the reason.

    token_ids counts every generated token, an end-of-sequence id included (its text is empty). logprobs has one entry per
    token id when asked for. prompt_logprobs comes once, with the first delta of each sample, when asked for.
    stop_reason: the stop string or the id of stop_token_ids that ended the sample; None for another end-of-sequence id or the
    length. latents: with the last delta, if asked for, float32 rows of hidden_size numbers in native order: of every token of
    prompt and sample but the sample's last, which was never computed (of the whole prompt if nothing was generated), or
    the last of these rows. error: with the last delta of a sample that could not go on, of which there are no latents and whose
    reason is `abort`.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    latents: bytes | None = None
    error: RequestError | NotFiniteError | None = None
