"""The server around the application, on real sockets: draining, failure, clients that vanish, bodies that are too large.

It runs in a thread, so signals are delivered by hand; `test_process.py` sends real ones to a real process.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from uvicorn.importer import import_from_string

from server import __main__ as command
from server.__main__ import FLUSH_SECONDS, Server, main
from server.api.malformed import protocol
from server.config import ServerConfig
from server.engine import loader
from server.engine.request import Delta, GenerationRequest
from tests.server.fakes import FakeEngine, Step, assert_envelope, make_app

BODY = {"model": "tiny", "prompt": "hi"}


class Running:
    """A server in a thread."""

    def __init__(self, engine: FakeEngine, http: Any = "auto", **settings: Any) -> None:
        listener = command._bind("127.0.0.1", 0)
        self.engine = engine
        self.address = listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        config = uvicorn.Config(make_app(engine), http=http, log_config=None, timeout_graceful_shutdown=FLUSH_SECONDS)
        self.server = Server(config, engine, ServerConfig(**settings), "hello")  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    def signal(self) -> None:
        self.server.handle_exit(SIGTERM, None)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path)

    def complete(self, **fields: Any) -> httpx.Response:
        return httpx.post(self.url + "/v1/completions", json={**BODY, **fields}, timeout=20)

    def has_exited(self) -> bool:
        self.thread.join(10)
        return not self.thread.is_alive()


@contextmanager
def running(engine: FakeEngine, http: Any = "auto", **settings: Any) -> Iterator[Running]:
    server = Running(engine, http, **settings)
    try:
        yield server
    finally:
        server.server.should_exit = True
        assert server.has_exited()


def wait_until(condition: Callable[[], bool]) -> None:
    """Raises AssertionError if it does not come true."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def paused(gate: threading.Event) -> Callable[[GenerationRequest], list[Step]]:
    return lambda _request: [Delta(0, "a", [1]), gate, Delta(0, "b", [2], finish_reason="length")]


@contextmanager
def in_background(work: Callable[[], httpx.Response]) -> Iterator[list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(work()), daemon=True)
    thread.start()
    yield answers
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(params=["h11", "httptools"])
def http(request: pytest.FixtureRequest) -> str:
    if request.param == "httptools":
        pytest.importorskip("httptools", reason="uvicorn's other HTTP implementation is not installed")
    return str(request.param)


@pytest.mark.parametrize("stream", [False, True])
def test_first_signal_finishes_what_runs_and_refuses_what_is_new(stream: bool) -> None:
    gate = threading.Event()
    engine = FakeEngine(paused(gate))
    with running(engine) as server, in_background(lambda: server.complete(stream=stream)) as answers:
        wait_until(lambda: engine.num_in_flight == 1)
        server.signal()
        wait_until(lambda: engine.is_draining)
        refused = server.complete()
        assert_envelope(refused, 503, "draining")
        assert refused.headers["retry-after"] == "1"
        assert_envelope(server.get("/ready"), 503, "draining")
        assert server.get("/health").status_code == 200
        gate.set()
        assert server.has_exited()
    assert answers[0].status_code == 200
    if stream:
        assert answers[0].text.endswith("data: [DONE]\n\n") and '"text":"b"' in answers[0].text
    else:
        assert answers[0].json()["choices"][0]["text"] == "ab"
    assert engine.is_stopped


def test_what_does_not_finish_in_time_is_aborted() -> None:
    engine = FakeEngine(paused(threading.Event()))
    with running(engine, shutdown_timeout=0.05) as server, in_background(server.complete) as answers:
        wait_until(lambda: engine.num_in_flight == 1)
        server.signal()
        assert server.has_exited()
    assert answers[0].json()["choices"][0]["finish_reason"] == "abort"


def test_dead_engine_is_told_and_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(command, "FAILURE_SECONDS", 0.5)
    with running(engine) as server:
        engine.error = RuntimeError("secret")
        assert_envelope(server.get("/health"), 503, "engine_dead")
        assert_envelope(server.complete(), 500, "internal_error")
        assert server.has_exited()


def test_dead_engine_may_be_told_to_stay(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(command, "FAILURE_SECONDS", 0.0)
    with running(engine, stay_on_failure=True) as server:
        engine.error = RuntimeError("secret")
        wait_until(lambda: "staying" in caplog.text)
        assert_envelope(server.get("/health"), 503, "engine_dead")
        assert not server.server.should_exit


@pytest.mark.parametrize("stream", [False, True])
def test_vanished_client_aborts_its_request(http: str, stream: bool) -> None:
    engine = FakeEngine(paused(threading.Event()))
    body = json.dumps({**BODY, "stream": stream}).encode()
    with running(engine, http) as server:
        with socket.create_connection(server.address, timeout=10) as client:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n" % len(body)
            client.sendall(head + body)
            wait_until(lambda: engine.num_in_flight == 1)
            if stream:
                assert client.recv(10_000).startswith(b"HTTP/1.1 200 OK")
            assert not engine.streams[0].is_closed
        wait_until(lambda: engine.streams[0].is_closed)
        assert engine.num_in_flight == 0
        engine.script = FakeEngine().script
        assert server.complete().status_code == 200


def of_server(http: str) -> type[asyncio.Protocol]:
    """The server's own protocol over one of uvicorn's."""
    name = {"h11": "h11_impl.H11Protocol", "httptools": "httptools_impl.HttpToolsProtocol"}[http]
    return protocol(import_from_string("uvicorn.protocols.http." + name.replace(".", ":")))


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: test\r\n"


@pytest.mark.parametrize(
    "request_", [b"nonsense\r\n\r\n", HEAD + b"content-length: x\r\n\r\n", HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n"]
)
def test_what_is_no_http_is_refused_in_the_envelope(http: str, request_: bytes) -> None:
    with running(FakeEngine(), of_server(http)) as server:
        with socket.create_connection(server.address, timeout=10) as client:
            client.sendall(request_)
            head, _, body = b"".join(iter(lambda: client.recv(10_000), b"")).partition(b"\r\n\r\n")
        response = httpx.Response(int(head.split()[1]), content=body)
        assert "not valid HTTP" in assert_envelope(response, 400, "invalid_request_error")
        assert b"content-type: application/json" in head.lower()
        assert server.complete().status_code == 200


def test_an_answer_on_its_way_is_not_mixed_with_a_refusal(http: str) -> None:
    gate = threading.Event()
    engine = FakeEngine(paused(gate))
    body = json.dumps({**BODY, "stream": True}).encode()
    with running(engine, of_server(http)) as server:
        with socket.create_connection(server.address, timeout=10) as client:
            client.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert client.recv(10_000).startswith(b"HTTP/1.1 200 OK")
            client.sendall(b"nonsense\r\n\r\n")
            gate.set()
            rest = b"".join(iter(lambda: client.recv(10_000), b""))
        assert b"not valid HTTP" not in rest[: rest.rfind(b"[DONE]")]
        assert server.complete().status_code == 200


@pytest.mark.parametrize("declared", [False, True])
def test_too_large_a_body(http: str, declared: bool) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(300):
            yield b" " * 1000

    content: Any = b" " * 300_000 if declared else chunks()
    with running(FakeEngine(), http) as server:
        response = httpx.post(server.url + "/v1/completions", content=content)
        assert_envelope(response, 413, "request_too_large")
        assert server.complete().status_code == 200


def test_many_requests_on_one_connection(http: str) -> None:
    with running(FakeEngine(), http) as server, httpx.Client(base_url=server.url) as client:
        for number in range(20):
            stream = number % 2 == 0
            response = client.post("/v1/completions", json={**BODY, "stream": stream})
            assert response.status_code == 200
            assert response.text.endswith("data: [DONE]\n\n") == stream


def test_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with command._bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert main(["--host", "127.0.0.1", "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"lrt-server: error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_unknown_host_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--host", "300.0.0.1"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("lrt-server: error: cannot listen on 300.0.0.1: ") and told.count("\n") == 1


def test_checkpoint_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), "--port", "0"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("lrt-server: error: ") and "nowhere" in told and told.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "tokenizer.tiktoken", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_checkpoint_is_named(checkpoint: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main([str(checkpoint), "--port", "0"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("lrt-server: error: ") and name in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--max-num-seqs", "9", "--max-num-batched-tokens", "8"],
            "(8) must be at least max_num_seqs (9)",
        ),
        (["--kv-cache-memory", "1K"], "--kv-cache-memory must hold"),
    ],
)
def test_numbers_that_do_not_go_together(
    checkpoint: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint), "--port", "0", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_threads_follow_the_flag_and_the_models_size(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else a quota may have its say
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    command._load(ServerConfig(checkpoint=checkpoint, threads=3))
    command._load(ServerConfig(checkpoint=checkpoint))
    monkeypatch.setattr(loader, "SMALL_MODEL", 1)
    command._load(ServerConfig(checkpoint=checkpoint))
    assert chosen == [3, 1], "as told; one for a small model; torch's own choice otherwise"
