"""One request's deltas on their way from the engine to their consumer, without a task or a timer of their own.

Everything here belongs to the event loop. Neighbours: `async_engine.py` fills the streams, `server/api/streaming.py` reads
several at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from server.engine.request import Delta


class DeltaStream:
    """What has arrived and was not taken yet: deltas, and behind them perhaps an error. num_samples last deltas end it.

    For one consumer, who either iterates or listens for news and takes what there is.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_pushed = [0] * num_samples
        """Deltas of each sample."""
        self.error: BaseException | None = None
        """What ended it, until an iteration has raised it."""
        self._arrived: list[Delta] = []
        self._num_unended = num_samples
        self._tell: Callable[[], None] | None = None
        self._interval = 1

    @property
    def has_ended(self) -> bool:
        """Whether no more will arrive."""
        return self._num_unended == 0

    @property
    def is_over(self) -> bool:
        """Whether no more will arrive and the consumer has met all that did."""
        return self._num_unended == 0 and not self._arrived and self.error is None

    def push(self, delta: Delta) -> None:
        """Hand the consumer something."""
        self._arrived.append(delta)
        if delta.finish_reason is not None:
            self._num_unended -= 1
        is_due = self._num_pushed[delta.index] % self._interval == 0 or delta.finish_reason is not None
        self._num_pushed[delta.index] += 1
        if self._tell is not None and is_due:
            self._tell()

    def fail(self, error: BaseException) -> None:
        """End it with an error, which stands behind what has arrived."""
        self.error, self._num_unended = error, 0
        if self._tell is not None:
            self._tell()

    def listen(self, tell: Callable[[], None] | None, interval: int = 1) -> None:
        """Have `tell` called whenever something arrives, or, of each sample, with the first delta, every interval-th after it
        and the last; None: no more."""
        self._tell, self._interval = tell, interval

    def take(self) -> list[Delta]:
        """The deltas that have arrived, without waiting."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> Delta:
        if self.is_over:
            raise StopAsyncIteration
        if not self._arrived and self.error is None:
            await self._wait()
        if not self._arrived:
            assert self.error is not None
            error, self.error = self.error, None
            raise error
        return self._arrived.pop(0)

    async def _wait(self) -> None:
        news = asyncio.get_running_loop().create_future()
        self.listen(lambda: None if news.done() else news.set_result(None))
        try:
            await news
        except asyncio.CancelledError:
            await self.aclose()
            raise
        finally:
            self.listen(None)

    async def aclose(self) -> None:
        """The consumer wants no more."""


def join(deltas: Sequence[Delta]) -> Delta:
    """One delta that says what consecutive ones of a sample say together."""
    first, last = deltas[0], deltas[-1]
    return Delta(
        first.index,
        "".join([delta.text for delta in deltas]),
        [token_id for delta in deltas for token_id in delta.token_ids],
        [entry for delta in deltas for entry in delta.logprobs],
        first.prompt_logprobs,
        last.finish_reason,
        last.stop_reason,
        last.num_cached_tokens,
        last.latents,
        last.error,
    )
