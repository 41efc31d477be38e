"""A started engine whose steps a test can hold up, an observer that keeps everything, and ways to drain streams."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrt_core.text import TextDecoder
from server.engine.async_engine import AsyncEngine, RequestStream
from server.engine.block_manager import Copy
from server.engine.model_runner import ModelRunner, WindowResult
from server.engine.request import Delta, GenerationRequest
from server.engine.scheduler import ScheduledWindow
from server.engine.stats import RequestStats, StepStats, TokenTimes
from tests.engines import make_engine, request
from tests.helpers import tiny_model, tiny_tokenizer

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
LETTERS = tuple(range(ord("a"), ord("z") + 1)) + tuple(range(256, 270))
"""Ids whose text is plain letters: single ones and pairs."""
LIMIT = 60.0
"""Seconds after which a test that hangs fails instead; nothing is timed."""


@dataclass
class Recorder:
    """An observer that keeps everything."""

    steps: list[StepStats] = field(default_factory=list)
    requests: list[tuple[int, int, int]] = field(default_factory=list)
    rejections: list[str] = field(default_factory=list)
    tokens: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    finished: list[RequestStats] = field(default_factory=list)

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_request(self, prompt_tokens: int, max_tokens: int, n: int) -> None:
        self.requests.append((prompt_tokens, max_tokens, n))

    def on_rejection(self, reason: str) -> None:
        self.rejections.append(reason)

    def on_tokens(self, times: TokenTimes) -> None:
        self.tokens += [(1, seconds, None) for seconds in times.since_arrival]
        self.tokens += [(1, None, seconds) for seconds in times.since_previous]

    def on_finished(self, stats: RequestStats) -> None:
        self.finished.append(stats)


class GatedRunner(ModelRunner):
    """Waits before every step until the gate is open; raises `error` instead once it is set."""

    gate: threading.Event
    error: BaseException | None = None
    num_steps = 0

    def execute(self, windows: Sequence[ScheduledWindow], copies: Sequence[Copy] = ()) -> list[WindowResult]:
        assert self.gate.wait(LIMIT)
        if self.error is not None:
            raise self.error
        results = super().execute(windows, copies)
        self.num_steps += 1
        return results


class Bench:
    """A started engine over a gated runner; the gate is open unless a test closes it."""

    def __init__(self, eos_ids: Sequence[int] = (), **overrides: Any) -> None:
        self.core = make_engine(MODEL, eos_ids, **overrides)
        self.runner = GatedRunner(MODEL, self.core.config)
        self.runner.gate = self.gate = threading.Event()
        self.gate.set()
        self.core.runner = self.runner
        self.recorder = Recorder()
        self.engine = AsyncEngine(self.core, TOKENIZER, self.recorder)

    async def __aenter__(self) -> Bench:
        await self.engine.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.gate.set()
        await self.engine.stop(drain=False)

    def all_free(self) -> bool:
        return self.core.blocks.num_free_blocks == self.core.config.num_blocks and not self.core.has_work()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until the condition holds or the engine fails (`run` bounds the wait)."""
        while not condition():
            self.raise_if_dead()
            await asyncio.sleep(0.001)

    def block_until(self, condition: Callable[[], bool]) -> None:
        """Hold the loop up until the condition holds, so that the engine runs ahead of it."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            self.raise_if_dead()
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def raise_if_dead(self) -> None:
        """Fail at once where a wait would never end."""
        if self.engine.error is not None:
            raise AssertionError("the engine died under the test") from self.engine.error


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine with a limit."""

    async def limited() -> None:
        await asyncio.wait_for(test(), LIMIT)

    asyncio.run(limited())


async def collect(stream: RequestStream) -> list[Delta]:
    return [delta async for delta in stream]


def ids_of(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def plain_text(ids: Sequence[int]) -> str:
    decoder = TextDecoder(TOKENIZER)
    return "".join(decoder.add(token) for token in ids) + decoder.finish()


def lettered(max_tokens: int = 20, **values: Any) -> GenerationRequest:
    """A sampled request whose text is letters, so that stop strings can be cut from it."""
    return request([1, 2, 3], max_tokens, temperature=1.0, seed=5, allowed_token_ids=LETTERS, **values)
