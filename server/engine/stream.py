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
        self.error: BaseException | None = None
        """What ended it, until an iteration has raised it."""
        self._arrived: list[Delta] = []
        self._held: list[list[Delta]] = [[] for _ in range(num_samples)]
        """Of each sample what waits for more."""
        self._has_begun = [False] * num_samples
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
        if delta.finish_reason is not None:
            self._num_unended -= 1
        if self._interval > 1:
            held = self._held[delta.index]
            held.append(delta)
            if self._has_begun[delta.index] and len(held) < self._interval and delta.finish_reason is None:
                return
            self._arrived += held
            held.clear()
        else:
            self._arrived.append(delta)
        self._has_begun[delta.index] = True
        if self._tell is not None:
            self._tell()

    def fail(self, error: BaseException) -> None:
        """End it with an error, which stands behind what has arrived."""
        self.release()
        self.error, self._num_unended = error, 0
        if self._tell is not None:
            self._tell()

    def listen(self, tell: Callable[[], None] | None, interval: int = 1) -> None:
        """Have `tell` called whenever something arrives; None: no more. From now on a sample's deltas arrive `interval` at a
        time, but for its first and with its last."""
        self._tell, self._interval = tell, interval

    def release(self) -> bool:
        """Let arrive what waits for more; returns whether there was any."""
        held = [delta for deltas in self._held for delta in deltas]
        for deltas in self._held:
            deltas.clear()
        self._arrived += held
        if held and self._tell is not None:
            self._tell()
        return bool(held)

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
