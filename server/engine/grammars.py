"""Compiled grammars for the event loop: off its thread and the engine's, each once, the latest kept. New sources are tried out
several at once, so that one does not have to wait for others that take long.

Neighbours: `async_engine.py` owns one, `grammar_probe.py` tries each new source out first, `lrt_core/grammar.py` compiles.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lrt_core.grammar import Grammar, GrammarCompiler, GrammarError, GrammarSource
from lrt_core.tokenizer import Tokenizer
from server.engine.grammar_probe import Probe
from server.engine.request import AdmissionError

logger = logging.getLogger(__name__)

MAX_GRAMMARS = 64
MAX_BYTES = 2 * 2**20
"""Bounds of what is kept: grammars, and characters of their sources in all."""
MAX_AT_ONCE = 8
"""Sources that are tried out at the same time."""
MAX_WAIT_SECONDS = 10.0
"""How long a source may wait for its turn before its request is refused."""


class GrammarCache:
    """Grammars by source, the least recently used dropped first; what is wrong with a bad one is remembered too.

    All methods belong to one event loop.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos_ids: Collection[int], max_grammars: int = MAX_GRAMMARS, max_bytes: int = MAX_BYTES
    ) -> None:
        self._tokenizer, self._eos_ids = tokenizer, frozenset(eos_ids)
        self.max_grammars, self.max_bytes = max_grammars, max_bytes
        self._tasks: OrderedDict[GrammarSource, asyncio.Task[Grammar]] = OrderedDict()
        self._size = 0
        self._probe = Probe()
        self._compiler: GrammarCompiler | None = None
        self.is_closed = False
        self.num_waiting = 0
        """Callers of `get` that have no answer yet."""
        self._compiling = threading.Lock()
        self._threads = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="lrt-grammar")

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def size(self) -> int:
        """Characters of the sources that are kept."""
        return self._size

    async def get(self, source: GrammarSource) -> Grammar:
        """The compiled source. Raises GrammarError, and AdmissionError where too many wait or once the cache is closed."""
        self.num_waiting += 1
        try:
            # Others may wait for the same grammar: who gives up must not take it from them.
            return replace(await asyncio.shield(self._task(source)), source=source)
        finally:
            self.num_waiting -= 1

    def _task(self, source: GrammarSource) -> asyncio.Task[Grammar]:
        """What compiles the source, or has compiled it."""
        task = self._tasks.get(source)
        if task is None:
            task = asyncio.ensure_future(self._compile(source))
            task.add_done_callback(lambda done: self._settle(source, done))
            self._tasks[source] = task
            self._size += len(source.text)
        self._tasks.move_to_end(source)
        self._trim()
        return task

    def forget(self, source: GrammarSource) -> None:
        """Compile it anew the next time."""
        if self._tasks.pop(source, None) is not None:
            self._size -= len(source.text)

    async def close(self) -> None:
        """End process and threads, after what is being compiled now; whoever waits behind it is refused. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        await asyncio.to_thread(self._threads.shutdown)
        self._probe.close()

    async def _compile(self, source: GrammarSource) -> Grammar:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._compile_now, source, time.monotonic())

    def _compile_now(self, source: GrammarSource, arrival: float) -> Grammar:
        if self.is_closed:
            raise AdmissionError("draining", "the server is shutting down and takes no new requests")
        if time.monotonic() - arrival > MAX_WAIT_SECONDS:
            raise AdmissionError("queue_full", "too many new forms of output are being tried out; try again later")
        self._probe.check(source)
        with self._compiling:
            if self._compiler is None:
                self._compiler = GrammarCompiler(self._tokenizer, self._eos_ids)
            return self._compiler.compile(source)

    def _settle(self, source: GrammarSource, task: asyncio.Task[Grammar]) -> None:
        """A failure that is not the source's own is no reason to fail the next time."""
        if task.cancelled() or (task.exception() is not None and not isinstance(task.exception(), GrammarError)):
            if self._tasks.get(source) is task:
                self.forget(source)
            if not self.is_closed and (task.cancelled() or not isinstance(task.exception(), AdmissionError)):
                logger.error("compiling a grammar failed", exc_info=None if task.cancelled() else task.exception())

    def _trim(self) -> None:
        while len(self._tasks) > self.max_grammars or (self._size > self.max_bytes and len(self._tasks) > 1):
            self.forget(next(iter(self._tasks)))
