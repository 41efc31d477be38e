"""Many short requests in random traffic with aborts, through the asynchronous engine: nothing is left, grows or slows down.

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

import torch

from server.engine.async_engine import AsyncEngine
from tests.engines import request
from tests.helpers import random_ids, tiny_tokenizer
from tests.proofs.scoring import engine_of, model_of

CLIENTS = 12
WARM = 50
"""Requests of each client before anything is counted."""
ROUNDS, TURNS = 6, 10
"""Fresh processes one after another, and the parts in which each serves a tenth, before or after the old one's part."""


@dataclass(frozen=True)
class Soak:
    """rates: requests a second of every tenth of the traffic; traced and resident: bytes after each tenth.

    ratios: for each part of the tenths after them its rate over a fresh process's for the same lengths, nothing traced.
    """

    num_aborted: int
    rates: list[float]
    ratios: list[float]
    traced: list[int]
    resident: list[int]
    num_used_blocks: int
    num_known_sequences: int
    num_tasks: int


def soak(count: int, rounds: int = ROUNDS) -> Soak:
    """`count` requests by CLIENTS clients that each wait for their own; a sixth hang up early. Closes every tenth.

    rounds: tenths served afterwards in turns with fresh processes. All tenths ask for the same lengths, numbers of samples and
    aborts; their ids differ.
    """
    return asyncio.run(_soak(count, rounds))


async def _soak(count: int, rounds: int) -> Soak:
    size = count // 10
    rates, traced, resident, num_aborted = [], [], [], 0
    async with _warm_engine() as engine:
        tracemalloc.start()
        for tenth in range(10):
            aborted, seconds = await _serve(engine, range(size), tenth)
            num_aborted += aborted
            rates.append(size / seconds)
            gc.collect()  # Python's own lists of freed tuples count as memory in use until then
            traced.append(tracemalloc.get_traced_memory()[0])
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        tracemalloc.stop()
        ratios = [ratio for tenth in range(rounds) for ratio in await _in_turns(engine, size, 10 + tenth)]
    core = engine.engine
    num_used = core.config.num_blocks - core.blocks.num_free_blocks
    known = len(core.scheduler.running) + len(core.scheduler.waiting) + engine.num_in_flight
    return Soak(num_aborted, rates, ratios, traced, resident, num_used, known, len(asyncio.all_tasks()) - 1)


@asynccontextmanager
async def _warm_engine() -> AsyncIterator[AsyncEngine]:
    """An engine that has served some."""
    engine = AsyncEngine(engine_of(model_of(torch.float32)), tiny_tokenizer())
    await engine.start()
    try:
        await _serve(engine, range(WARM * CLIENTS), -1)
        yield engine
    finally:
        await engine.stop()


async def _serve(engine: AsyncEngine, numbers: range, tenth: int) -> tuple[int, float]:
    """Serve the requests of these numbers; returns how many were aborted, and the seconds."""
    started, left = time.monotonic(), iter(numbers)
    aborted = await asyncio.gather(*(_client(engine, left, tenth) for _ in range(CLIENTS)))
    return sum(aborted), time.monotonic() - started


async def _client(engine: AsyncEngine, numbers: Iterator[int], tenth: int) -> int:
    """Serve requests until none is left; returns how many it aborted."""
    aborted = 0
    for number in numbers:
        rng = random.Random(number)
        ids = random_ids(rng.randint(1, 24), random.Random(f"{number} {tenth}").randint(0, 50))
        item = request(ids, rng.randint(1, 10), n=rng.choice([1, 1, 1, 2]))
        stream, leaves = engine.admit(item), rng.random() < 1 / 6
        aborted += leaves
        async for _ in stream:
            if leaves:
                await stream.aclose()
                break
    return aborted


async def _in_turns(engine: AsyncEngine, size: int, tenth: int) -> list[float]:
    """Serve a tenth in parts, a fresh process the same in turns; returns ratios of rates."""
    ratios = []
    with _fresh_process() as fresh:
        for turn in range(TURNS):
            numbers = range(turn * size // TURNS, (turn + 1) * size // TURNS)
            beside = _ask(fresh, numbers) if turn % 2 else 0.0
            _, seconds = await _serve(engine, numbers, tenth)
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
        async with _warm_engine() as engine:
            connection.send("warm")
            while True:
                try:
                    numbers = connection.recv()
                except EOFError:
                    return
                connection.send((await _serve(engine, numbers, 0))[1])

    torch.set_num_threads(num_threads)
    asyncio.run(serve())
