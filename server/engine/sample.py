"""One sample as its consumer sees it: text so far, times, how it ended. Lives on the event loop; `async_engine.py` owns it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lrt_core.tokenizer import Tokenizer
from server.engine.detokenizer import Detokenizer
from server.engine.engine import SequenceOutput
from server.engine.request import Delta, FinishReason, GenerationRequest
from server.engine.sequence import Sequence
from server.engine.stats import RequestStats


@dataclass(eq=False)
class Sample:
    """Sample `index` of a request; arrival in seconds of time.monotonic()."""

    request: GenerationRequest
    index: int
    tokenizer: Tokenizer
    arrival: float
    sequence: Sequence | None = None
    """Its sequence, once the engine has taken it."""
    finished: bool = False
    num_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    _detokenizer: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer, self.request.stopping.stop)

    def count_token(self, now: float) -> tuple[float | None, float | None]:
        """Note a token's arrival; returns (seconds since the request's arrival, None) for the first, else (None, seconds since
        the one before)."""
        previous, self.last_token = self.last_token, now
        self.num_tokens += 1
        if previous is None:
            self.first_token = now
            return now - self.arrival, None
        return None, now - previous

    def make_delta(self, item: SequenceOutput) -> Delta:
        """Turn an engine output into what the client gets; a stop string in the text ends the sample here."""
        delta = Delta(
            self.index,
            prompt_logprobs=item.prompt_logprobs,
            finish_reason=item.finish_reason,
            num_cached_tokens=item.sequence.num_cached_prompt_tokens or 0,
        )
        stop: str | None = None
        if item.token is not None:
            delta.token_ids.append(item.token.token_id)
            if self.request.logprobs is not None:
                delta.logprobs.append(item.token)
            delta.text, stop = self._detokenizer.add(item.token.token_id)
        if stop is None and item.finish_reason is not None:
            rest, stop = self._detokenizer.finish()
            delta.text += rest
        if stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", stop
        return delta

    def stats(self, reason: FinishReason, now: float) -> RequestStats:
        """The sample's record once it has ended."""
        return RequestStats(
            prompt_tokens=len(self.request.prompt_ids),
            generation_tokens=self.num_tokens,
            cached_tokens=(self.sequence.num_cached_prompt_tokens or 0) if self.sequence is not None else 0,
            finish_reason=reason,
            arrival=self.arrival,
            scheduled=self.sequence.first_scheduled if self.sequence is not None else None,
            first_token=self.first_token,
            last_token=self.last_token,
            finished=now,
        )
