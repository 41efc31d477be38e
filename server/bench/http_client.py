"""A lean HTTP/1.1 client over asyncio streams and h11: what it costs is taken from the server it measures. No torch.

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


class HttpError(Exception):
    """No answer, or no answer that is HTTP; the message says why, without the address, so that equal ones count together."""


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


class Connection:
    """One connection that serves one request at a time; `is_open` tells whether it can take another."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._http = h11.Connection(h11.CLIENT)

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
            return int(event.status_code)
        except (OSError, h11.ProtocolError) as error:
            raise HttpError(_reason(error)) from None

    async def body(self) -> AsyncIterator[tuple[float, bytes]]:
        """The answer's parts, each with the `time.perf_counter()` of its arrival. Raises HttpError."""
        try:
            size = 0
            while isinstance(event := await self._next(), h11.Data):
                size += len(event.data)
                if size > MAX_BODY:
                    raise HttpError(f"the answer is longer than {MAX_BODY} bytes")
                yield self._arrived, bytes(event.data)
            if not isinstance(event, h11.EndOfMessage):
                raise HttpError("the server closed the connection in the middle of an answer")
            if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
                self._http.start_next_cycle()
        except (OSError, h11.ProtocolError) as error:
            raise HttpError(_reason(error)) from None

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
        assert self._reader is not None
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self._reader.read(CHUNK)
            self._arrived = time.perf_counter()
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                raise HttpError("the server closed the connection without an answer")
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
        return status, b"".join([part async for _, part in connection.body()])

    try:
        return await asyncio.wait_for(exchange(), timeout)
    except asyncio.TimeoutError:
        raise HttpError(f"no answer within {timeout:g} s") from None
    finally:
        connection.close()
