"""One sample as its consumer sees it: text so far, times, how it ended. Lives on the event loop; `async_engine.py` owns it."""

from __future__ import annotations

from lrt_core.tokenizer import Tokenizer
from server.engine.detokenizer import Detokenizer
from server.engine.request import Delta, FinishReason, GenerationRequest
from server.engine.stats import RequestStats, TokenTimes
from server.engine.worker import SampleOutput, SampleStart


class Sample:
    """Sample `index` of a request, which the engine's worker knows by its key; arrival in seconds of time.monotonic()."""

    def __init__(self, request: GenerationRequest, index: int, tokenizer: Tokenizer, arrival: float, key: int) -> None:
        self.request, self.index, self.arrival, self.key = request, index, arrival, key
        self.num_tokens = self.num_cached_tokens = 0
        self.scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        stopping = request.stopping
        self._detokenizer = Detokenizer(tokenizer, stopping.stop, stopping.min_tokens, stopping.include_stop)
        self._latents: list[bytes] = []

    def start(self, start: SampleStart) -> None:
        """The engine has begun to serve it."""
        self.scheduled, self.num_cached_tokens = start.scheduled, start.num_cached_tokens

    def count_token(self, now: float, times: TokenTimes) -> None:
        """Note a token's arrival, in `times` too."""
        self.num_tokens += 1
        if self.last_token is None:
            self.first_token = now
            times.since_arrival.append(now - self.arrival)
        else:
            times.since_previous.append(now - self.last_token)
        self.last_token = now

    def make_delta(self, item: SampleOutput) -> Delta:
        """Turn an engine output into what the client gets; a stop string in the text ends the sample here."""
        delta = Delta(self.index, "", [], [], item.prompt_logprobs, item.finish_reason, None, self.num_cached_tokens)
        stop: str | int | None = None
        if item.token is not None:
            token_id = item.token.token_id
            delta.token_ids.append(token_id)
            if self.request.logprobs is not None:
                delta.logprobs.append(item.token)
            stop = token_id if self._is_stop_id(item) else None
            if stop is None or self.request.stopping.include_stop:
                delta.text, found = self._detokenizer.add(token_id)
                stop = stop if found is None else found
        if item.finish_reason is not None and not isinstance(stop, str):
            rest, found = self._detokenizer.finish()
            delta.text += rest
            stop = stop if found is None else found
        if stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", stop
        self._take_latents(item, delta)
        return delta

    def _is_stop_id(self, item: SampleOutput) -> bool:
        """Whether the engine ended it for a token that the request names."""
        assert item.token is not None
        return item.finish_reason == "stop" and item.token.token_id in self.request.stopping.stop_token_ids

    def _take_latents(self, item: SampleOutput, delta: Delta) -> None:
        """Keep the latents that came, and hand them over with the last delta."""
        if item.latents is None:
            return
        if self.request.latents == "last":
            self._latents.clear()
        self._latents.append(item.latents)
        if delta.finish_reason is not None and item.error is None:
            delta.latents = b"".join(self._latents)

    def stats(self, reason: FinishReason, now: float) -> RequestStats:
        """The sample's record once it has ended."""
        return RequestStats(
            prompt_tokens=len(self.request.prompt_ids),
            generation_tokens=self.num_tokens,
            cached_tokens=self.num_cached_tokens,
            finish_reason=reason,
            arrival=self.arrival,
            scheduled=self.scheduled,
            first_token=self.first_token,
            last_token=self.last_token,
            finished=now,
        )
