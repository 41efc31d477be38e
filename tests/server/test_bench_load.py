"""The bench's clients against a server that misbehaves in every way a server can."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from dataclasses import replace
from typing import Any

import pytest

from server.bench.api_probe import adapt, model_name
from server.bench.errors import BenchError
from server.bench.http_client import Address, Chunks, Connection, HttpError, fetch
from server.bench.load import Job, LoadRun, Outcome, error_text, request_bodies, request_body
from server.bench.processes import run_load
from tests.server.fake_openai import Behaviour, fake_openai

JOB = Job(
    url="", model="fake", clients=2, rate=None, requests=5, prompt_len=3, new_tokens=4, stream=True, seed=0, request_timeout=20
)


def load(behaviour: Behaviour, **changes: Any) -> Outcome:
    """Run JOB with changes on a server of this behaviour."""
    with fake_openai(behaviour) as url:
        return asyncio.run(LoadRun(replace(JOB, url=url, **changes)).run())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("arrivals", [{"clients": 2}, {"clients": None, "rate": 200.0}])
def test_everything_is_counted(stream: bool, arrivals: dict[str, Any]) -> None:
    behaviour = Behaviour()
    outcome = load(behaviour, stream=stream, **arrivals)
    assert (outcome.num_finished, outcome.tokens, outcome.prompt_tokens) == (5, 20, 15)
    assert outcome.errors == {} and outcome.num_unfinished == 0 and outcome.seconds > 0
    assert len(outcome.latency) == 5
    assert (len(outcome.first_token), len(outcome.gaps)) == ((5, 15) if stream else (0, 0))
    assert len(outcome.lateness) == (5 if arrivals["clients"] is None else 0)
    assert len({tuple(body["prompt"]) for body in behaviour.bodies}) == 5, "no two prompts are the same"
    assert all(body["ignore_eos"] is True and body["temperature"] == 0 for body in behaviour.bodies)
    assert all(first <= whole for first, whole in zip(outcome.first_token, outcome.latency, strict=False))


def test_without_usage_the_events_of_a_stream_are_its_tokens() -> None:
    outcome = load(Behaviour(), include_usage=False)
    assert (outcome.tokens, outcome.prompt_tokens) == (20, 0)


def test_a_process_of_its_own_comes_to_the_same() -> None:
    with fake_openai(Behaviour()) as url:
        outcome = run_load(replace(JOB, url=url))
    assert (outcome.num_finished, outcome.tokens, len(outcome.gaps)) == (5, 20, 15)


@pytest.mark.parametrize(
    ("behaviour", "changes", "errors"),
    [
        (Behaviour(status=500), {}, {"HTTP 500: out of order": 5}),
        (Behaviour(status=503, good=2), {"clients": 1}, {"HTTP 503: out of order": 3}),
        (Behaviour(garbage=True), {"stream": False}, {"the answer is not JSON": 5}),
        (Behaviour(garbage=True), {}, {"an answer without choices": 5}),
        (Behaviour(delay=5.0), {"request_timeout": 0.2}, {"no whole answer within 0.2 s": 5}),
    ],
)
def test_failures_are_counted(behaviour: Behaviour, changes: dict[str, Any], errors: dict[str, int]) -> None:
    outcome = load(behaviour, **changes)
    assert outcome.errors == errors and outcome.num_finished == 5 - sum(errors.values())


def test_broken_streams_are_counted() -> None:
    outcome = load(Behaviour(breaks=True))
    assert sum(outcome.errors.values()) == 5 and all("closed" in reason for reason in outcome.errors)


@pytest.mark.parametrize("stream", [True, False])
def test_a_connection_that_its_server_has_closed_is_no_failure(stream: bool) -> None:
    outcome = load(Behaviour(closes=True), stream=stream)
    assert (outcome.num_finished, outcome.errors) == (5, {})


def test_an_error_within_a_stream_is_counted() -> None:
    events = b'data: {"choices": [{"text": "x"}]}\n\ndata: {"error": {"message": "gone"}}\n\ndata: [DONE]\n\n'
    with answering(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(events), events)) as url:
        outcome = asyncio.run(LoadRun(replace(JOB, url=url, requests=1)).run())
    assert list(outcome.errors) == ["error within a stream: {'message': 'gone'}"]


@pytest.mark.parametrize("arrivals", [{"clients": 2}, {"clients": None, "rate": 1000.0}])
def test_the_time_limit_holds(arrivals: dict[str, Any]) -> None:
    outcome = load(Behaviour(delay=30.0), time_limit=0.3, **arrivals)
    assert outcome.num_unfinished == 5 and outcome.tokens == 0 and outcome.errors == {}


def test_a_server_that_is_not_there() -> None:
    outcome = asyncio.run(LoadRun(replace(JOB, url=f"http://127.0.0.1:{free_port()}")).run())
    assert outcome.errors == {"connection refused": 5}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


class answering:
    """A server that gives the same bytes to one connection, whatever it is asked, and closes it."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(self._answer)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __exit__(self, *error: object) -> None:
        self._thread.join(10)
        self._listener.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "closed the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc", "closed"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", "in the middle of an answer"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabcde\r\n", "not in chunks"),
    ],
)
def test_what_is_no_http_is_an_error(answer: bytes, message: str) -> None:
    with answering(answer) as url, pytest.raises(HttpError, match=message):
        asyncio.run(fetch(Address.parse(url), "GET", "/", timeout=10))


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 100])
def test_chunks_come_together_however_they_arrive(piece: int) -> None:
    body = b"5\r\nhello\r\n1A;x=y\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nSome-Trailer: 1\r\n\r\n"
    chunks = Chunks()
    content = b""
    for start in range(0, len(body), piece):
        assert not chunks.is_complete
        content += chunks.feed(body[start : start + piece])
    assert content == b"helloabcdefghijklmnopqrstuvwxyz" and chunks.is_complete


@pytest.mark.parametrize("begin", [b"-5\r\n", b"zz\r\n", b"\r\n", b"_\r\n", b"3\r\nabcde", b"ffffffffff\r\n", b"0" * 70000])
def test_what_is_no_chunk_is_refused(begin: bytes) -> None:
    with pytest.raises(ValueError, match=r"no chunk|invalid literal"):
        Chunks().feed(begin)


def test_a_connection_that_is_to_be_closed_is_not_used_again() -> None:
    async def once(url: str) -> bool:
        connection = Connection(Address.parse(url))
        await connection.send("GET", "/")
        assert [part for _, part in await connection.body()] == [b"abc"]
        return connection.is_open

    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    with answering(head + b"3\r\nabc\r\n0\r\n\r\n") as url:
        assert not asyncio.run(once(url))


def test_fetch_waits_only_so_long() -> None:
    with fake_openai(Behaviour(delay=30.0)) as url, pytest.raises(HttpError, match=r"no answer within 0\.1 s"):
        body = request_body(replace(JOB, stream=False), random.Random(0))
        asyncio.run(fetch(Address.parse(url), "POST", "/v1/completions", body, 0.1))


def test_a_connection_serves_several_requests() -> None:
    async def twice(url: str) -> list[bytes]:
        connection = Connection(Address.parse(url))
        answers = []
        for _ in range(2):
            assert await connection.send("GET", "/v1/models") == 200
            answers.append(b"".join(part for _, part in await connection.body()))
            assert connection.is_open
        connection.close()
        assert not connection.is_open
        return answers

    with fake_openai(Behaviour()) as url:
        assert [json.loads(answer) for answer in asyncio.run(twice(url))] == [{"data": [{"id": "fake"}]}] * 2


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://host", Address("host", 80)),
        ("https://host/", Address("host", 443, tls=True)),
        ("http://host:8000/v1", Address("host", 8000)),
        ("http://[::1]:8000/api/v1/", Address("::1", 8000, "/api")),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert Address.parse(url) == address


def test_authority() -> None:
    assert Address("::1", 8000).authority == "[::1]:8000" and Address("host", 80).authority == "host:80"


def test_text_prompts_and_what_else_a_body_says() -> None:
    job = replace(JOB, prompts_are_ids=False, ignore_eos=False, include_usage=False, prompt_len=7)
    first, second = (json.loads(body) for body in list(request_bodies(job))[:2])
    assert len(first["prompt"].split()) == 7 and first["prompt"] != second["prompt"]
    assert "ignore_eos" not in first and "stream_options" not in first
    assert "stream_options" not in json.loads(request_body(replace(JOB, stream=False), random.Random(0)))
    assert list(request_bodies(job)) == list(request_bodies(job)), "a seed says it all"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "no\\n  way"}}', "HTTP 400: no way"),
        (b'{"error": "no"}', "HTTP 400: no"),
        (b'{"detail": "no"}', "HTTP 400: {'detail': 'no'}"),
        (b"[1]", "HTTP 400: [1]"),
        (b"<html>\xff", "HTTP 400: <html>\ufffd"),
        (b"x" * 1000, "HTTP 400: " + "x" * 200),
    ],
)
def test_error_text(body: bytes, text: str) -> None:
    assert error_text(400, body) == text


def test_adapt_leaves_out_what_is_refused() -> None:
    for behaviour, expected in (
        (Behaviour(), []),
        (Behaviour(refused=frozenset({"ignore_eos"})), ["ignore_eos"]),
        (Behaviour(refused=frozenset({"stream_options"}), refuses_ids=True), ["include_usage", "prompts_are_ids"]),
    ):
        with fake_openai(behaviour) as url:
            job, left_out = adapt(replace(JOB, url=url))
        assert left_out == expected
        assert (job.ignore_eos, job.include_usage, job.prompts_are_ids) == tuple(
            name not in expected for name in ("ignore_eos", "include_usage", "prompts_are_ids")
        )
        assert (job.prompt_len, job.new_tokens) == (JOB.prompt_len, JOB.new_tokens)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (Behaviour(refused=frozenset({"model"})), "answers HTTP 400: no model here"),
        (Behaviour(status=503), "answers HTTP 503: out of order"),
    ],
)
def test_adapt_gives_up(behaviour: Behaviour, message: str) -> None:
    with fake_openai(behaviour) as url, pytest.raises(BenchError, match=message):
        adapt(replace(JOB, url=url))


def test_model_name() -> None:
    with fake_openai(Behaviour(models=("a", "b"))) as url:
        assert model_name(url, 10) == "a"
    with fake_openai(Behaviour(models=())) as url, pytest.raises(BenchError, match="lists no models"):
        model_name(url, 10)
    with pytest.raises(BenchError, match="connection refused"):
        model_name(f"http://127.0.0.1:{free_port()}", 10)
