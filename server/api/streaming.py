"""Several engine streams as one, and the end of work whose client has gone.

Neighbours: `completions.py` uses them for plain and streamed responses, `events.py` writes what is streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.engine.request import Delta
from server.engine.stream import DeltaStream, join

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 15.0
GATHER_SECONDS = 1.0
"""Silence after which tokens wait no longer for others to share an event with."""


class _News:
    """Wakes the one that waits for news of several streams. A timer serves many waits: rewinding it for every token costs
    more than letting it run out and look."""

    def __init__(self, streams: Sequence[DeltaStream], idle_seconds: float, interval: int) -> None:
        self._loop, self._idle_seconds, self._streams = asyncio.get_running_loop(), idle_seconds, streams
        self._look_seconds = idle_seconds if interval == 1 else min(idle_seconds, GATHER_SECONDS)
        self._is_set = True  # there may be something already
        self._waiter: asyncio.Future[bool] | None = None
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        for stream in streams:
            stream.listen(self._set, interval)

    async def wait(self) -> bool:
        """Return at once if there was news since the last wait, else when there is; false after idle_seconds without."""
        if not self._is_set:
            self._waiter, self._since = self._loop.create_future(), self._loop.time()
            if self._timer is None:
                self._timer = self._loop.call_later(self._look_seconds, self._look)
            has_news = await self._waiter
        else:
            has_news = True
        self._is_set = False  # the caller takes all there is
        return has_news

    def close(self) -> None:
        """Let go of the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _set(self) -> None:
        if self._waiter is None or self._waiter.done():
            self._is_set = True
        else:
            self._waiter.set_result(True)

    def _look(self) -> None:
        """The timer has run out: silence, if the present wait has lasted that long."""
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        lasted = self._loop.time() - self._since
        if lasted >= self._look_seconds and any([stream.release() for stream in self._streams]):
            return
        if lasted >= self._idle_seconds:
            self._waiter.set_result(False)
            return
        rest = (self._look_seconds if lasted < self._look_seconds else self._idle_seconds) - lasted
        self._timer = self._loop.call_later(min(rest, self._look_seconds), self._look)


async def merge(
    streams: Sequence[DeltaStream], idle_seconds: float, interval: int = 1
) -> AsyncGenerator[list[tuple[int, Delta]], None]:
    """Whatever arrived since the last batch, as (index of the stream, delta), one delta a sample; an empty batch after each
    idle_seconds of silence. A sample's deltas arrive `interval` at a time, but for its first and with its last, and after
    GATHER_SECONDS of silence. A stream's error is raised once what came before it was yielded. Closing it aborts what is
    unfinished."""
    news = _News(streams, idle_seconds, interval)
    try:
        while not all(stream.is_over for stream in streams):
            if not await news.wait():
                yield []
            batch = [(index, delta) for index, stream in enumerate(streams) for delta in _take(stream)]
            error = next((stream.error for stream in streams if stream.error is not None), None)
            if batch:
                yield batch
            if error is not None:
                raise error
    finally:
        news.close()
        for stream in streams:
            await stream.aclose()


async def gather(streams: Sequence[DeltaStream]) -> list[tuple[int, Delta]]:
    """All that the streams ever have, in one delta a sample, as (index of the stream, delta). Raises the first error."""
    news = asyncio.Event()
    for stream in streams:
        stream.listen(lambda stream=stream: news.set() if stream.has_ended else None)  # type: ignore[misc]
    while not all(stream.has_ended for stream in streams):
        await news.wait()
        news.clear()
        error = next((stream.error for stream in streams if stream.error is not None), None)
        if error is not None:
            raise error
    return [(index, delta) for index, stream in enumerate(streams) for delta in _take(stream)]


def _take(stream: DeltaStream) -> list[Delta]:
    """What has arrived, joined by sample."""
    arrived = stream.take()
    if len(arrived) < 2:
        return arrived
    by_sample: dict[int, list[Delta]] = {}
    for delta in arrived:
        by_sample.setdefault(delta.index, []).append(delta)
    return [join(deltas) for deltas in by_sample.values()]


@asynccontextmanager
async def aborting(streams: Sequence[DeltaStream]) -> AsyncIterator[None]:
    """On leaving, abort every request of `streams` that is unfinished."""
    try:
        yield
    finally:
        for stream in streams:
            await stream.aclose()


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises ClientDisconnect then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancel(task, watch)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStreamResponse(StreamingResponse):
    """Sends events until they end or the client goes; either way the requests behind them are over afterwards."""

    def __init__(self, events: AsyncGenerator[bytes, None], streams: Sequence[DeltaStream], headers: Mapping[str, str]) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", **headers}, media_type="text/event-stream")
        self._events, self._streams = events, streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        async with aborting(self._streams), aclosing(self._events):
            try:
                await until_disconnect(receive, self.stream_response(send))
            except (ClientDisconnect, OSError):
                return  # nobody is left to tell
