"""Many short requests in random traffic with aborts, through the HTTP application: nothing is left, grows or slows down.

After them it serves more, in turns with fresh processes that serve their first: a shared machine's rate moves by a fifth from
one tenth of the traffic to the next, so rates of other seconds say little about what the requests between have left behind.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import random
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from fastapi import FastAPI

from server.engine.async_engine import AsyncEngine
from tests.helpers import random_ids, tiny_tokenizer
from tests.proofs.scoring import engine_of, model_of
from tests.server.fakes import Client, make_app

CLIENTS = 12
WARM = 50
"""Requests of each client before anything is counted."""
SIZES = {"num_blocks": 18, "max_model_len": 64}
"""Blocks of 4 tokens; the longest request takes 14 of them and 8 run at once, so that some are preempted."""
ROUNDS, TURNS = 40, 10
"""Fresh processes one after another, at most, and the parts in which each serves a tenth, before or after the old one's."""
ERROR = 0.0125
"""Standard error of the median ratio that is precise enough."""


@dataclass(frozen=True)
class Soak:
    """rates: requests a second of every tenth of the traffic; traced and resident: bytes after each tenth.

    ratios: for each part of the tenths after them its rate over a fresh process's for the same lengths, nothing traced.
    """

    num_aborted: int
    num_preemptions: int
    rates: list[float]
    ratios: list[float]
    traced: list[int]
    resident: list[int]
    num_used_blocks: int
    num_tasks: int


def soak(count: int, max_rounds: int = ROUNDS) -> Soak:
    """`count` requests by CLIENTS clients that each wait for their own; a quarter hang up, at any moment, many of them too late
    to matter. Closes every tenth.

    max_rounds: tenths served afterwards in turns with fresh processes, at most. All ask for the same lengths; ids differ.
    """
    return asyncio.run(_soak(count, max_rounds))


async def _soak(count: int, max_rounds: int) -> Soak:
    size = count // 10
    rates, ratios, traced, resident, num_aborted = [], [], [], [], 0
    async with _warm_engine() as (engine, app):
        tracemalloc.start()
        for tenth in range(10):
            aborted, seconds = await _serve(app, range(size), tenth)
            num_aborted += aborted
            rates.append(size / seconds)
            gc.collect()  # Python's own lists of freed tuples count as memory in use until then
            traced.append(tracemalloc.get_traced_memory()[0])
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        tracemalloc.stop()
        for tenth in range(10, 10 + max_rounds):
            ratios += await _in_turns(app, size, tenth)
            if standard_error(ratios) <= ERROR:
                break
        core = engine.engine
        await asyncio.wait_for(_settled(engine), 10)
        left = (core.config.num_blocks - core.blocks.num_free_blocks, len(asyncio.all_tasks()) - 1)
    return Soak(num_aborted, core.scheduler.totals.num_preemptions, rates, ratios, traced, resident, *left)


async def _settled(engine: AsyncEngine) -> None:
    """Wait until the engine has heard of the last that hung up."""
    while engine.num_in_flight or engine.engine.has_work():
        await asyncio.sleep(0.01)


def standard_error(samples: list[float]) -> float:
    """Of the median of as good as normal samples, from their quartiles."""
    low, _, high = quantiles(samples, n=4)
    return 0.93 * (high - low) / len(samples) ** 0.5


@asynccontextmanager
async def _warm_engine() -> AsyncIterator[tuple[AsyncEngine, FastAPI]]:
    """An engine and its application, which have served some."""
    engine = AsyncEngine(engine_of(model_of(torch.float32), **SIZES), tiny_tokenizer())
    await engine.start()
    try:
        app = make_app(engine)
        await _serve(app, range(WARM * CLIENTS), -1)
        yield engine, app
    finally:
        await engine.stop()


async def _serve(app: FastAPI, numbers: range, tenth: int) -> tuple[int, float]:
    """Serve the requests of these numbers; returns how many were aborted, and the seconds."""
    started, left = time.monotonic(), iter(numbers)
    aborted = await asyncio.gather(*(_client(app, left, tenth) for _ in range(CLIENTS)))
    return sum(aborted), time.monotonic() - started


async def _client(app: FastAPI, numbers: Iterator[int], tenth: int) -> int:
    """Serve requests until none is left; returns how many were aborted."""
    aborted = 0
    for number in numbers:
        rng = random.Random(number)
        ids = random_ids(rng.randint(1, 24), random.Random(f"{number} {tenth}").randint(0, 50))
        body = {
            "prompt": ids,
            "max_tokens": rng.randint(1, 10),
            "n": rng.choice([1, 1, 1, 2]),
            "stream": rng.random() < 0.7,
            "ignore_eos": True,
        }
        client = Impatient(app, rng.choice([0, 0, 0, 1, 2, 4]) if rng.random() < 1 / 4 else None, temperature=0, **body)
        await client.task
        assert client.status == 200 or client.has_left
        aborted += not client.is_whole
    return aborted


class Impatient(Client):
    """A client that hangs up after so many parts of the answer (0: a millisecond after asking), or never."""

    def __init__(self, app: FastAPI, patience: int | None, **fields: Any) -> None:
        super().__init__(app, **fields)
        self.has_left, self._patience = False, patience
        if patience == 0:
            asyncio.get_running_loop().call_later(0.001, self.leave)

    def leave(self) -> None:
        """Hang up, once."""
        if not self.has_left:
            self.has_left = True
            super().leave()

    async def _send(self, message: Any) -> None:
        await super()._send(message)
        if self._patience is not None and len(self.parts) >= self._patience > 0:
            self.leave()


async def _in_turns(app: FastAPI, size: int, tenth: int) -> list[float]:
    """Serve a tenth in parts, a fresh process the same in turns; returns ratios of rates."""
    ratios = []
    with _fresh_process() as fresh:
        for turn in range(TURNS):
            numbers = range(turn * size // TURNS, (turn + 1) * size // TURNS)
            beside = _ask(fresh, numbers) if turn % 2 else 0.0
            _, seconds = await _serve(app, numbers, tenth)
            ratios.append((beside or _ask(fresh, numbers)) / seconds)
    return ratios


@contextmanager
def _fresh_process() -> Iterator[Connection]:
    """A process that serves the numbers sent to it with an engine of its own, and answers with the seconds."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve_numbers, args=(its, torch.get_num_threads()))
    process.start()
    its.close()  # so that its death ends our wait
    try:
        ours.recv()  # it is warm
        yield ours
    finally:
        ours.close()
        process.join()


def _ask(fresh: Connection, numbers: range) -> float:
    """Seconds of the fresh process for these numbers. Blocks: our own engine is idle meanwhile."""
    fresh.send(numbers)
    return float(fresh.recv())


def _serve_numbers(connection: Connection, num_threads: int) -> None:
    async def serve() -> None:
        async with _warm_engine() as (_, app):
            connection.send("warm")
            while True:
                try:
                    numbers = connection.recv()
                except EOFError:
                    return
                connection.send((await _serve(app, numbers, 0))[1])

    torch.set_num_threads(num_threads)
    asyncio.run(serve())
