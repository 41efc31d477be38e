"""The clients of `lrt-bench serve`, in a process of their own: reads a job from stdin, writes what happened to stdout.

Closed loop: each client asks again as soon as it is answered. Open loop: requests arrive at random times of a given rate,
whatever the server does. While the clock runs the bytes of an answer and their times are kept, and nothing else; they are read
afterwards. No torch. Neighbours: `serve.py` starts it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from server.bench.http_client import Address, ClosedError, Connection, HttpError

PATH = "/v1/completions"
MAX_IDLE_SECONDS = 2.0
"""How long a connection may rest and still be used; servers close theirs after some seconds."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Job:
    """What to send. clients: of a closed loop, or None; rate: requests per second of an open one, or None. prompt_len in
    tokens (in words for text prompts); ids are drawn below vocab_size. api_key: what every request carries, empty
    for none. request_timeout and time_limit in seconds."""

    url: str
    model: str
    clients: int | None
    rate: float | None
    requests: int
    prompt_len: int
    new_tokens: int
    stream: bool
    seed: int
    vocab_size: int = 1000
    prompts_are_ids: bool = True
    ignore_eos: bool = True
    include_usage: bool = True
    api_key: str = field(default="", repr=False)
    request_timeout: float = 300.0
    time_limit: float = 300.0

    @property
    def address(self) -> Address:
        """The server, and the key that it wants."""
        return Address.parse(self.url, self.api_key)


@dataclass
class Outcome:
    """What came of a job. seconds: from the first request to the last answer. num_events: of streams, with choices. All times
    in seconds, of finished requests: first_token since the request was sent, gaps between the events of a stream, latency of
    whole answers. lateness: by how much requests of an open loop were sent later than they arrived; far above zero the client
    itself was too slow."""

    seconds: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    num_events: int = 0
    num_finished: int = 0
    num_unfinished: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    first_token: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)


@dataclass
class Exchange:
    """One request: when it was sent, what came back and when."""

    body: bytes
    sent: float = 0.0
    finished: float | None = None
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


class LoadRun:
    """Runs one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._address = job.address
        self._exchanges = [Exchange(body) for body in request_bodies(job)]
        self._idle: list[tuple[float, Connection]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._lateness: list[float] = []

    async def run(self) -> Outcome:
        """Send everything, at most until the time limit; what is not finished by then counts as unfinished."""
        started = time.perf_counter()
        job = self._job
        self._start(self._closed(job.clients) if job.clients is not None else self._open(job.rate or 1.0))
        await asyncio.wait({self._tasks[0]}, timeout=job.time_limit)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for task in self._tasks:
            if not task.cancelled():
                task.result()  # a failure here is one of this program
        for _, connection in self._idle:
            connection.close()
        finished = [exchange.finished for exchange in self._exchanges if exchange.finished is not None]
        seconds = max(finished, default=time.perf_counter()) - started
        return summarise(self._exchanges, seconds, job.stream, self._lateness)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._tasks.append(asyncio.ensure_future(work))
        return self._tasks[-1]

    async def _closed(self, clients: int) -> None:
        waiting = iter(self._exchanges)

        async def client() -> None:
            for exchange in waiting:
                await self._exchange(exchange)

        await asyncio.gather(*(self._start(client()) for _ in range(clients)))

    async def _open(self, rate: float) -> None:
        chance = random.Random(self._job.seed)
        arrival, tasks = time.perf_counter(), []
        for exchange in self._exchanges:
            arrival += chance.expovariate(rate)
            await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
            self._lateness.append(time.perf_counter() - arrival)
            tasks.append(self._start(self._exchange(exchange)))
        await asyncio.gather(*tasks)

    async def _exchange(self, exchange: Exchange) -> None:
        """Send a request and read its answer, on a connection that is free or a new one."""
        connection = self._take_connection()
        exchange.sent = time.perf_counter()
        try:
            await asyncio.wait_for(self._read(connection, exchange), self._job.request_timeout)
        except asyncio.TimeoutError:
            exchange.error = f"no whole answer within {self._job.request_timeout:g} s"
        except HttpError as error:
            exchange.error = str(error)
        finally:
            if connection.is_open:
                self._idle.append((time.perf_counter(), connection))
            else:
                connection.close()

    def _take_connection(self) -> Connection:
        """The one that was used last, unless its server may be about to close it."""
        if self._idle and time.perf_counter() - self._idle[-1][0] < MAX_IDLE_SECONDS:
            return self._idle.pop()[1]
        return Connection(self._address)

    async def _read(self, connection: Connection, exchange: Exchange) -> None:
        is_kept = connection.is_open
        try:
            status = await connection.send("POST", PATH, exchange.body)
        except ClosedError:
            if not is_kept:
                raise
            connection.close()  # its server had closed it, as it may: the request goes over a new one
            status = await connection.send("POST", PATH, exchange.body)
        exchange.parts = await connection.body()
        exchange.finished = time.perf_counter()
        if status != 200:
            exchange.error = error_text(status, b"".join(data for _, data in exchange.parts))


def request_bodies(job: Job) -> Iterator[bytes]:
    """The bodies, each with a prompt of its own, so that no prefix cache answers for the model."""
    chance = random.Random(job.seed)
    for _ in range(job.requests):
        yield request_body(job, chance)


def request_body(job: Job, chance: random.Random) -> bytes:
    """One greedy request of exactly new_tokens tokens, as far as the server can be told so."""
    body: dict[str, Any] = {"model": job.model, "max_tokens": job.new_tokens, "temperature": 0, "stream": job.stream}
    if job.prompts_are_ids:
        body["prompt"] = [chance.randrange(job.vocab_size) for _ in range(job.prompt_len)]
    else:
        body["prompt"] = " ".join("".join(chance.choices(LETTERS, k=3)) for _ in range(job.prompt_len))
    if job.ignore_eos:
        body["ignore_eos"] = True
    if job.stream and job.include_usage:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()


def error_text(status: int, body: bytes) -> str:
    """What a refusal says, on one short line."""
    try:
        data = json.loads(body)
        error = data.get("error", data) if isinstance(data, dict) else data
        message = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        message = body.decode("utf-8", "replace")
    return f"HTTP {status}: {' '.join(str(message).split())[:200]}"


def summarise(exchanges: list[Exchange], seconds: float, stream: bool, lateness: list[float]) -> Outcome:
    """Read what came back."""
    outcome, errors = Outcome(seconds=seconds, lateness=lateness), Counter[str]()
    for exchange in exchanges:
        if exchange.error is None and exchange.finished is not None:
            exchange.error = _count(outcome, exchange, stream)
        if exchange.error is not None:
            errors[exchange.error] += 1
        elif exchange.finished is None:
            outcome.num_unfinished += 1
    outcome.errors = dict(errors)
    return outcome


def _count(outcome: Outcome, exchange: Exchange, stream: bool) -> str | None:
    """Add a whole answer to the outcome; returns what is wrong with it, if anything."""
    try:
        answers = list(_events(exchange.parts)) if stream else [(0.0, json.loads(b"".join(data for _, data in exchange.parts)))]
    except ValueError:
        return "the answer is not JSON"
    failed = next((answer["error"] for _, answer in answers if "error" in answer), None)
    if failed is not None:
        return f"error within a stream: {str(failed)[:200]}"
    stamps = [stamp for stamp, answer in answers if answer.get("choices")]
    if not stamps:
        return "an answer without choices"
    usage = next((answer["usage"] for _, answer in reversed(answers) if answer.get("usage")), None)
    outcome.num_finished += 1
    outcome.num_events += len(stamps)
    outcome.tokens += usage["completion_tokens"] if usage else len(stamps)
    outcome.prompt_tokens += usage["prompt_tokens"] if usage else 0
    assert exchange.finished is not None
    outcome.latency.append(exchange.finished - exchange.sent)
    if stream:
        outcome.first_token.append(stamps[0] - exchange.sent)
        outcome.gaps += [after - before for before, after in itertools.pairwise(stamps)]
    return None


def _events(parts: list[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """JSON of server-sent events, with the time at which each was complete. Raises ValueError."""
    buffer = b""
    for stamp, data in parts:
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            content = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and content != b"[DONE]":
                event = json.loads(content)
                if not isinstance(event, dict):
                    raise ValueError("an event that is no object")
                yield stamp, event


def main() -> int:
    """A job as JSON from stdin, its outcome as JSON to stdout."""
    job = Job(**json.load(sys.stdin))
    json.dump(asdict(asyncio.run(LoadRun(job).run())), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
