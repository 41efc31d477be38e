"""What the socket answers while the model loads, and that it is the same socket afterwards."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from server.loading import answering


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        yield bound


def url(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("path", ["/ready", "/health", "/v1/models", "/nowhere"])
def test_everything_has_to_wait(listener: socket.socket, path: str) -> None:
    with answering(listener):
        response = httpx.get(url(listener) + path)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["code"] == "loading"


def test_a_completion_has_to_wait(listener: socket.socket) -> None:
    with answering(listener):
        response = httpx.post(url(listener) + "/v1/completions", json={"prompt": "x" * 100_000})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")


def test_the_process_is_live(listener: socket.socket) -> None:
    with answering(listener):
        response = httpx.get(url(listener) + "/live")
        head = httpx.head(url(listener) + "/live")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert (head.status_code, head.content) == (200, b"")


def test_nonsense_is_survived_and_the_socket_stays(listener: socket.socket) -> None:
    with answering(listener):
        for nonsense in (b"\r\n\r\n", b"\x16\x03\x01", b"GET /\r\n"):
            with socket.create_connection(listener.getsockname()) as client:
                client.sendall(nonsense)
                client.shutdown(socket.SHUT_WR)
                client.recv(1000)
        assert httpx.get(url(listener) + "/ready").status_code == 503
    with socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"hello")
            assert client.recv(5) == b"hello"


def test_a_client_that_hangs_up_is_no_news(
    listener: socket.socket, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with answering(listener):
        for _ in range(5):
            with socket.create_connection(listener.getsockname()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
                client.sendall(b"POST / HTTP/1.1\r\ncontent-length: 100000\r\n\r\n")
        assert httpx.get(url(listener) + "/ready").status_code == 503
        while [thread for thread in threading.enumerate() if thread.name.startswith("Thread-") and thread.daemon]:
            time.sleep(0.01)
    assert (capsys.readouterr().err, caplog.records) == ("", [])
