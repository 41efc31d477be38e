"""A lean HTTP/1.1 client over asyncio streams: what it costs is taken from the server it measures. No torch.

h11 speaks the protocol, but for the chunks of a stream: to take one apart costs it as much as the server spent on sending it.
Neighbours: `load.py` sends completions with it, `api_probe.py` asks what a server can do.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

CHUNK = 65536
MAX_BODY = 64 * 2**20
"""Bytes of one answer; a server that sends more is stopped."""
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
        if end < 0 and len(rest) > CHUNK:
            raise ValueError("no chunk begins like that")
        return b"".join(content)


class Connection:
    """One connection that serves one request at a time; `is_open` tells whether it can take another."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._http = h11.Connection(h11.CLIENT)
        self._is_chunked = self._is_last = False
        self._arrived = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the last answer was read to its end and the server keeps the connection."""
        return self._writer is not None and self._http.our_state is h11.IDLE and self._http.their_state is h11.IDLE

    async def send(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request and wait for the answer's head; returns its status. Raises HttpError."""
        try:
            await self._connect()
            assert self._writer is not None
            headers = [("host", self._address.authority), ("accept", "*/*"), ("content-length", str(len(body)))]
            if body:
                headers.append(("content-type", "application/json"))
            if self._address.key:
                headers.append(("authorization", f"Bearer {self._address.key}"))
            parts: list[h11.Event] = [h11.Request(method=method, target=self._address.prefix + path, headers=headers)]
            parts += [h11.Data(data=body)] if body else []
            self._writer.write(b"".join(self._http.send(part) or b"" for part in [*parts, h11.EndOfMessage()]))
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

    async def body(self) -> AsyncIterator[tuple[float, bytes]]:
        """The answer's parts, each with the `time.perf_counter()` of its arrival. Raises HttpError."""
        size = 0
        try:
            async for data in self._chunks() if self._is_chunked else self._data():
                size += len(data)
                if size > MAX_BODY:
                    raise HttpError(f"the answer is longer than {MAX_BODY} bytes")
                yield self._arrived, data
        except (OSError, h11.ProtocolError) as error:
            raise HttpError(_reason(error)) from None

    async def _data(self) -> AsyncIterator[bytes]:
        """A body whose end its length tells, or the connection's."""
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)
        if not isinstance(event, h11.EndOfMessage):
            raise HttpError(CUT_SHORT)
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()

    async def _chunks(self) -> AsyncIterator[bytes]:
        """A chunked body; what h11 has read of it already comes first."""
        chunks, data = Chunks(), self._http.trailing_data[0]
        while True:
            try:
                content = chunks.feed(data)
            except ValueError:
                raise HttpError("the answer's body is not in chunks, as its head says") from None
            if content:
                yield content
            if chunks.is_complete:
                break
            data = await self._receive()
            if not data:
                raise HttpError(CUT_SHORT)
        if self._is_last:
            self.close()
        else:
            self._http = h11.Connection(h11.CLIENT)

    def close(self) -> None:
        """Close it, whatever it is doing; a later `send` connects anew."""
        if self._writer is not None:
            self._writer.close()
        self._writer, self._http = None, h11.Connection(h11.CLIENT)

    async def _connect(self) -> None:
        if not self.is_open:
            self.close()
            tls = ssl.create_default_context() if self._address.tls else None
            self._reader, self._writer = await asyncio.open_connection(self._address.host, self._address.port, ssl=tls)

    async def _next(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self._receive()
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                raise ClosedError("the server closed the connection without an answer")
            self._http.receive_data(data)
        return event

    async def _receive(self) -> bytes:
        assert self._reader is not None
        data = await self._reader.read(CHUNK)
        self._arrived = time.perf_counter()
        return data


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
        return status, b"".join([part async for _, part in connection.body()])

    try:
        return await asyncio.wait_for(exchange(), timeout)
    except asyncio.TimeoutError:
        raise HttpError(f"no answer within {timeout:g} s") from None
    finally:
        connection.close()
