"""Several engine streams as one, server-sent events, and the end of work whose client has gone.

Neighbours: `completions.py` uses all three for plain and streamed responses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.api.errors import dump_json
from server.engine.async_engine import RequestStream
from server.engine.request import Delta

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 15.0


def event(content: Any) -> bytes:
    """One server-sent event that carries JSON."""
    return b"data: " + dump_json(content) + b"\n\n"


async def merge(streams: Sequence[RequestStream], idle_seconds: float) -> AsyncGenerator[list[tuple[int, Delta]], None]:
    """Whatever arrived since the last batch, as (index of the stream, delta); an empty batch after each idle_seconds of
    silence. A stream's exception is raised once what came before it was yielded. Closing it aborts what is unfinished."""
    arrived: list[tuple[int, Delta]] = []
    news = asyncio.Event()

    async def pump(index: int, stream: RequestStream) -> None:
        async for delta in stream:
            arrived.append((index, delta))
            news.set()

    async def wait_for_news() -> bool:
        """False when none came in time. (asyncio.wait_for can swallow a cancellation that meets the news.)"""
        timer = asyncio.get_running_loop().call_later(idle_seconds, news.set)
        started = time.monotonic()
        await news.wait()
        timer.cancel()
        news.clear()
        return bool(arrived) or time.monotonic() - started < idle_seconds

    tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(lambda _task: news.set())
    try:
        while not all(task.done() for task in tasks) or arrived:
            is_silent = not await wait_for_news()
            batch, arrived[:] = arrived[:], []
            failed = next((task for task in tasks if task.done() and task.exception() is not None), None)
            if batch or is_silent:
                yield batch
            if failed is not None:
                failed.result()
    finally:
        await _cancel(*tasks)


@asynccontextmanager
async def aborting(streams: Sequence[RequestStream]) -> AsyncIterator[None]:
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

    def __init__(
        self, events: AsyncGenerator[bytes, None], streams: Sequence[RequestStream], headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", **headers}, media_type="text/event-stream")
        self._events, self._streams = events, streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        async with aborting(self._streams), aclosing(self._events):
            try:
                await until_disconnect(receive, self.stream_response(send))
            except (ClientDisconnect, OSError):
                return  # nobody is left to tell
