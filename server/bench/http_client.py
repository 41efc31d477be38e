"""A lean HTTP/1.1 client: what it costs is taken from the server it measures. No torch.

h11 speaks the protocol, but for the chunks of a stream: to take one apart costs it as much as the server spent on sending it.
Nor is a task woken for them: they are put by as they arrive, until the answer is whole.
Neighbours: `load.py` sends completions with it, `api_probe.py` asks what a server can do.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

MAX_SIZE_LINE = 65536
"""Bytes of the line before a chunk, extensions with it."""
BUFFER_SIZE = 65536
MAX_BODY = 64 * 2**20
"""Bytes of one answer; a server that sends more is stopped."""
TOO_LONG = f"the answer is longer than {MAX_BODY} bytes"
CUT_SHORT = "the server closed the connection in the middle of an answer"


class HttpError(Exception):
    """No answer, or no answer that is HTTP; the message says why, without the address, so that equal ones count together."""


class ClosedError(HttpError):
    """The connection ended before any answer."""


@dataclass(frozen=True)
class Address:
    """Where a server listens; `prefix` is the path before /v1, often empty; key: what every request carries, empty for none."""

    host: str
    port: int
    prefix: str = ""
    tls: bool = False
    key: str = field(default="", repr=False)

    @classmethod
    def parse(cls, url: str, key: str = "") -> Address:
        """From http://host:port, with or without /v1 at its end. Raises ValueError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is not a URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is not a URL such as http://127.0.0.1:8000")
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), prefix, tls, key)

    @property
    def authority(self) -> str:
        """For the Host header and for people."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Chunks:
    """Takes a chunked body apart."""

    def __init__(self) -> None:
        self.is_complete = False
        self._rest = bytearray()

    def feed(self, data: bytes) -> bytes:
        """The content of the chunks that `data` completes. Raises ValueError for what is no chunk, or none to be waited for."""
        rest, content = self._rest, []
        rest += data
        while (end := rest.find(b"\r\n")) >= 0:
            digits = rest[:end].partition(b";")[0].rstrip()
            size = int(digits, 16) if digits.isalnum() else -1
            start, stop = end + 2, end + 2 + size
            is_torn = size > 0 and not b"\r\n".startswith(bytes(rest[stop : stop + 2]))
            if is_torn or not 0 <= size <= MAX_BODY:
                raise ValueError("no chunk")
            if size == 0:
                self.is_complete = rest.find(b"\r\n\r\n", end) >= 0  # behind what trailers there are
                break
            if len(rest) < stop + 2:
                break
            content.append(bytes(rest[start:stop]))
            del rest[: stop + 2]
        if end < 0 and len(rest) > MAX_SIZE_LINE:
            raise ValueError("no chunk begins like that")
        return b"".join(content)


class _Wire(asyncio.BufferedProtocol):
    """The bytes of a connection on their way to one reader, each piece with the `time.perf_counter()` of its arrival.

    The buffer is its own: for every piece asyncio would have 256 KiB mapped and unmapped by the system.
    """

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self.has_ended = False
        self._error: Exception | None = None
        self._arrived: deque[tuple[float, bytes]] = deque()
        self._taker: Callable[[float, bytes], bool] | None = None
        self._waiter: asyncio.Future[None] | None = None

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by asyncio."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Called by asyncio."""
        data = bytes(self._buffer[:nbytes])
        if self._taker is None:
            self._arrived.append((time.perf_counter(), data))
            self._wake()
        elif self._taker(time.perf_counter(), data):
            self._taker = None
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self.has_ended, self._error = True, exc
        self._wake()

    async def receive(self) -> bytes:
        """The next piece; empty when the connection has ended. Raises OSError."""
        while not self._arrived and not self.has_ended:
            await self._wait()
        if self._arrived:
            return self._arrived.popleft()[1]
        if self._error is not None:
            raise self._error
        return b""

    async def hand_to(self, taker: Callable[[float, bytes], bool]) -> None:
        """Hand all that arrives to `taker` until it returns true for enough. Raises OSError, and EOFError when the connection
        ends before."""
        while self._arrived:
            if taker(*self._arrived.popleft()):
                return
        self._taker = taker
        while self._taker is not None:
            if self.has_ended:
                raise self._error or EOFError
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _ChunkedBody:
    """The parts of a chunked body, until it is whole or something is wrong with it."""

    def __init__(self) -> None:
        self.parts: list[tuple[float, bytes]] = []
        self.problem: str | None = None
        self._size = 0
        self._chunks = Chunks()

    def take(self, stamp: float, data: bytes) -> bool:
        """Add what arrived; whether that is all."""
        try:
            content = self._chunks.feed(data)
        except ValueError:
            self.problem = "the answer's body is not in chunks, as its head says"
            return True
        if content:
            self.parts.append((stamp, content))
            self._size += len(content)
            if self._size > MAX_BODY:
                self.problem = TOO_LONG
        return self._chunks.is_complete or self.problem is not None


class Connection:
    """One connection that serves one request at a time; `is_open` tells whether it can take another."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._wire = _Wire()
        self._transport: asyncio.WriteTransport | None = None
        self._http = h11.Connection(h11.CLIENT)
        self._is_chunked = self._is_last = False

    @property
    def is_open(self) -> bool:
        """Whether the last answer was read to its end and the server keeps the connection."""
        is_idle = self._http.our_state is h11.IDLE and self._http.their_state is h11.IDLE
        return self._transport is not None and is_idle and not self._wire.has_ended

    async def send(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request and wait for the answer's head; returns its status. Raises HttpError."""
        try:
            transport = await self._connect()
            headers = [("host", self._address.authority), ("accept", "*/*"), ("content-length", str(len(body)))]
            if body:
                headers.append(("content-type", "application/json"))
            if self._address.key:
                headers.append(("authorization", f"Bearer {self._address.key}"))
            parts: list[h11.Event] = [h11.Request(method=method, target=self._address.prefix + path, headers=headers)]
            parts += [h11.Data(data=body)] if body else []
            transport.write(b"".join(self._http.send(part) or b"" for part in [*parts, h11.EndOfMessage()]))
            while isinstance(event := await self._next(), h11.InformationalResponse):
                continue
            if not isinstance(event, h11.Response):
                raise HttpError("the server's answer has no head")
            fields = [(name, value.lower()) for name, value in event.headers]
            self._is_chunked = (b"transfer-encoding", b"chunked") in fields
            self._is_last = (b"connection", b"close") in fields or event.http_version < b"1.1"
            return int(event.status_code)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ClosedError(_reason(error)) from None
        except (OSError, h11.ProtocolError) as error:
            raise HttpError(_reason(error)) from None

    async def body(self) -> list[tuple[float, bytes]]:
        """The whole answer in the parts in which it came, each with the `time.perf_counter()` of its arrival. Raises
        HttpError."""
        try:
            return await (self._chunked() if self._is_chunked else self._plain())
        except (OSError, h11.ProtocolError) as error:
            raise HttpError(_reason(error)) from None

    async def _plain(self) -> list[tuple[float, bytes]]:
        """A body whose end its length tells, or the connection's."""
        parts, size = [], 0
        while isinstance(event := await self._next(), h11.Data):
            parts.append((time.perf_counter(), bytes(event.data)))
            size += len(event.data)
            if size > MAX_BODY:
                raise HttpError(TOO_LONG)
        if not isinstance(event, h11.EndOfMessage):
            raise HttpError(CUT_SHORT)
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        return parts

    async def _chunked(self) -> list[tuple[float, bytes]]:
        """A chunked body; what h11 has read of it already comes first."""
        body = _ChunkedBody()
        try:
            if not body.take(time.perf_counter(), self._http.trailing_data[0]):
                await self._wire.hand_to(body.take)
        except EOFError:
            raise HttpError(CUT_SHORT) from None
        if body.problem is not None:
            raise HttpError(body.problem)
        if self._is_last:
            self.close()
        else:
            self._http = h11.Connection(h11.CLIENT)
        return body.parts

    def close(self) -> None:
        """Close it, whatever it is doing; a later `send` connects anew."""
        if self._transport is not None:
            self._transport.close()
        self._transport, self._http = None, h11.Connection(h11.CLIENT)

    async def _connect(self) -> asyncio.WriteTransport:
        if self._transport is None or not self.is_open:
            self.close()
            tls = ssl.create_default_context() if self._address.tls else None
            loop = asyncio.get_running_loop()
            self._transport, self._wire = await loop.create_connection(_Wire, self._address.host, self._address.port, ssl=tls)
        return self._transport

    async def _next(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self._wire.receive()
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                raise ClosedError("the server closed the connection without an answer")
            self._http.receive_data(data)
        return event


def _reason(error: Exception) -> str:
    """One line for a failure of the network or of the protocol."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    text = getattr(error, "strerror", None) or str(error)
    return text or type(error).__name__


async def fetch(address: Address, method: str, path: str, body: bytes = b"", timeout: float = 30.0) -> tuple[int, bytes]:
    """One request on a connection of its own; status and body. Raises HttpError."""
    connection = Connection(address)

    async def exchange() -> tuple[int, bytes]:
        status = await connection.send(method, path, body)
        return status, b"".join(part for _, part in await connection.body())

    try:
        return await asyncio.wait_for(exchange(), timeout)
    except asyncio.TimeoutError:
        raise HttpError(f"no answer within {timeout:g} s") from None
    finally:
        connection.close()
