"""The body of a request: what is JSON, how much of it is read, and the envelope on every path."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.server.fakes import FakeEngine, assert_envelope, call, make_app

INVALID = "invalid_request_error"
PATH = "/v1/completions"

NOT_JSON = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"{'a': 1}", "not valid JSON"),
    (b'{"model": "tiny"} x', "not valid JSON"),
    (b"[]", "must be a JSON object"),
    (b'"text"', "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b'{"temperature": NaN}', "NaN is not a JSON number"),
    (b'{"temperature": -Infinity}', "-Infinity is not a JSON number"),
    (b'{"model": "tiny\xff"}', "not UTF-8: invalid byte at position 15"),
    (b'{"stop": "a", "n": 1, "stop": "b"}', "'stop' appears twice"),
    (b"[" * 5000, "nested too deeply"),
    (b'{"a":' * 1900, "nested too deeply"),
    (b'{"seed": 1' + b"0" * 5000 + b"}", "a number of too many digits."),
]


@pytest.mark.parametrize(("body", "message"), NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_is_not_a_json_object_is_told(body: bytes, message: str) -> None:
    told = assert_envelope(call(make_app(FakeEngine()), "POST", PATH, content=body), 400, INVALID)
    assert message in told
    assert len(told) < 300


def test_a_key_that_comes_again_among_many_is_found_at_once() -> None:
    body = b"{%s}" % b",".join(b'"%d":0' % (number % 99_999) for number in range(100_000))
    response = call(make_app(FakeEngine(), max_body_size=2_000_000), "POST", PATH, content=body)
    assert "the key '0' appears twice" in assert_envelope(response, 400, INVALID)


def test_infinite_numbers_are_refused() -> None:
    body = b'{"model": "tiny", "prompt": "a", "temperature": 1e999}'
    told = assert_envelope(call(make_app(FakeEngine()), "POST", PATH, content=body), 400, INVALID, "temperature")
    assert "finite" in told


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"]
)
def test_content_type_does_not_matter(content_type: str) -> None:
    body = '{"model": "tiny", "prompt": "\u00e9"}'.encode()
    response = call(make_app(FakeEngine()), "POST", PATH, content=body, headers={"content-type": content_type})
    assert response.status_code == 200


def test_a_compressed_body_is_told_as_such() -> None:
    body = b'{"model": "tiny", "prompt": "a"}'
    packed = call(make_app(FakeEngine()), "POST", PATH, content=gzip.compress(body), headers={"content-encoding": "gzip"})
    assert "its content-encoding is 'gzip'" in assert_envelope(packed, 400, INVALID)
    plain = call(make_app(FakeEngine()), "POST", PATH, content=body, headers={"content-encoding": "Identity"})
    assert plain.status_code == 200


def test_declared_size_is_refused_unread() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    response = call(make_app(FakeEngine()), "POST", PATH, content=chunks(), headers={"content-length": "10001"})
    assert "10000 bytes" in assert_envelope(response, 413, "request_too_large")


def test_undeclared_size_is_refused_at_the_limit() -> None:
    given = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(1000):
            given += 1
            yield b" " * 1000

    assert_envelope(call(make_app(FakeEngine()), "POST", PATH, content=chunks()), 413, "request_too_large")
    assert given <= 12
    assert call(make_app(FakeEngine()), "POST", PATH, content=b"{}" + b" " * 9_998).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/chat", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ],
)
def test_unknown_path_and_method(method: str, path: str, status: int) -> None:
    response = call(make_app(FakeEngine()), method, path)
    told = assert_envelope(response, status, None)
    assert f"{method} {path}" in told
    assert ("allow" in response.headers) == (status == 405)


def test_the_unforeseen_shows_nothing_of_the_inside() -> None:
    engine = FakeEngine()

    def explode(_request: Any) -> None:
        raise ZeroDivisionError("secret")

    engine.check = explode  # type: ignore[method-assign]
    response = call(make_app(engine), "POST", PATH, json={"model": "tiny", "prompt": "a"})
    assert "secret" not in assert_envelope(response, 500, "internal_error")


def test_client_gone_while_sending_is_no_error() -> None:
    async def run() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b"", "http_version": "1.1"}
        await make_app(FakeEngine())(scope, receive, send)
        return sent

    assert asyncio.run(run())[0]["status"] == 499


def test_httpx_streams_a_body_without_a_length() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"model": "tiny",'
        yield b'"prompt": "a"}'

    response: httpx.Response = call(make_app(FakeEngine()), "POST", PATH, content=chunks())
    assert response.status_code == 200
