"""What the engine tells whoever counts: plain data handed to an `EngineObserver` (`server/metrics.py` is the one in use).

Times are seconds of `time.monotonic()`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from server.engine.request import FinishReason


@dataclass
class StepStats:
    """State after one engine step (or after an idle engine dropped its last request), and what the step did."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """Fraction of blocks in use, 0..1."""
    step_seconds: float = 0.0
    """Wall time of the step; 0 when nothing ran."""
    num_scheduled_tokens: int = 0
    """Rows of the step's forward, refinement passes included."""
    num_scored_tokens: int = 0
    """Prompt tokens from the prefix cache whose logprobs were made in this step."""
    num_settled_prompt_tokens: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    """Tokens lost to a preemption and not found in the cache when their sequence came back in this step."""
    num_prefix_queries: int = 0
    """Tokens of sequences that looked into the prefix cache in this step, and of those the ones found there."""
    num_prefix_hits: int = 0
    refinement_residuals: list[float] = field(default_factory=list)
    """Per prompt window of this step: relative L2 change of its latents since the previous pass."""
    refinement_passes: list[float] = field(default_factory=list)
    """Per prompt fully read in this step: forward rows computed per token that was not cached."""


@dataclass(frozen=True)
class RequestStats:
    """One finished sample as its consumer saw it. A time is None when the sample never got that far."""

    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    finish_reason: FinishReason
    arrival: float
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    finished: float


@dataclass
class TokenTimes:
    """Generated tokens that arrived together, each of which is its sample's first (seconds since the request's arrival) or a
    later one (seconds since the one before)."""

    since_arrival: list[float] = field(default_factory=list)
    since_previous: list[float] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of both kinds."""
        return len(self.since_arrival) + len(self.since_previous)


class EngineObserver(Protocol):
    """Called on the event loop, while the next step computes. Callbacks must not raise."""

    def on_step(self, stats: StepStats) -> None:
        """After every engine step."""

    def on_request(self, prompt_tokens: int, max_tokens: int, n: int) -> None:
        """A request was admitted."""

    def on_rejection(self, reason: str) -> None:
        """A request was refused for load; reason as in AdmissionError."""

    def on_tokens(self, times: TokenTimes) -> None:
        """Generated tokens arrived, of all samples that one step served."""

    def on_finished(self, stats: RequestStats) -> None:
        """A sample ended, aborted ones included."""


class NullObserver:
    """Counts nothing; for tests, benchmarks and offline use."""

    def on_step(self, stats: StepStats) -> None:
        """Ignore."""

    def on_request(self, prompt_tokens: int, max_tokens: int, n: int) -> None:
        """Ignore."""

    def on_rejection(self, reason: str) -> None:
        """Ignore."""

    def on_tokens(self, times: TokenTimes) -> None:
        """Ignore."""

    def on_finished(self, stats: RequestStats) -> None:
        """Ignore."""
