"""Many short requests in random traffic with aborts, through the asynchronous engine: nothing is left, nothing grows."""

from __future__ import annotations

import asyncio
import gc
import random
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from server.engine.async_engine import AsyncEngine
from tests.engines import request
from tests.helpers import random_ids, tiny_tokenizer
from tests.proofs.scoring import engine_of, model_of

CLIENTS = 12
WARM = 50
"""Requests of each client before anything is counted."""


@dataclass(frozen=True)
class Soak:
    """rates: requests a second of every tenth of the traffic; traced and resident: bytes after each tenth."""

    num_aborted: int
    rates: list[float]
    traced: list[int]
    resident: list[int]
    num_used_blocks: int
    num_known_sequences: int
    num_tasks: int


def soak(count: int) -> Soak:
    """`count` requests by CLIENTS clients that each wait for their own; a sixth hang up early. Closes every tenth."""
    return asyncio.run(_soak(count))


async def _soak(count: int) -> Soak:
    engine = AsyncEngine(engine_of(model_of(torch.float32)), tiny_tokenizer())
    await engine.start()
    tracemalloc.start()
    await asyncio.gather(*(_client(engine, iter(range(WARM))) for _ in range(CLIENTS)))
    rates, traced, resident, num_aborted = [], [], [], 0
    for part in range(10):
        started, numbers = time.monotonic(), iter(range(part * count // 10, (part + 1) * count // 10))
        num_aborted += sum(await asyncio.gather(*(_client(engine, numbers) for _ in range(CLIENTS))))
        rates.append(_size(part, count) / (time.monotonic() - started))
        gc.collect()  # Python's own lists of freed tuples count as memory in use until then
        traced.append(tracemalloc.get_traced_memory()[0])
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    tracemalloc.stop()
    await engine.stop()
    core = engine.engine
    num_used = core.config.num_blocks - core.blocks.num_free_blocks
    known = len(core.scheduler.running) + len(core.scheduler.waiting) + engine.num_in_flight
    return Soak(num_aborted, rates, traced, resident, num_used, known, len(asyncio.all_tasks()) - 1)


def _size(part: int, count: int) -> int:
    """Requests of a tenth."""
    return (part + 1) * count // 10 - part * count // 10


async def _client(engine: AsyncEngine, numbers: Iterator[int]) -> int:
    """Serve requests until none is left; returns how many it aborted."""
    aborted = 0
    for number in numbers:
        rng = random.Random(number)
        item = request(random_ids(rng.randint(1, 24), rng.randint(0, 50)), rng.randint(1, 10), n=rng.choice([1, 1, 1, 2]))
        stream, leaves = engine.admit(item), rng.random() < 1 / 6
        aborted += leaves
        async for _ in stream:
            if leaves:
                await stream.aclose()
                break
    return aborted
