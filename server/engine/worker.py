"""The engine's thread: carries out what the event loop asks for, steps while there is work, reports what came of it.

Neighbours: `engine.py` is what it owns, `async_engine.py` stands at the other end. The loop names every sample by a key of its
own and never touches a sequence; the thread never touches a stream. Between two computations stands only what the next one
needs: whatever else a step entails (text, counting, encoding) the loop does while the next step computes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from server.engine.engine import Engine, SequenceOutput, StepOutput
from server.engine.request import FinishReason, GenerationRequest, TokenLogprob
from server.engine.sequence import Sequence
from server.engine.stats import StepStats

logger = logging.getLogger(__name__)

Command = Callable[[], None]


class SampleStart(NamedTuple):
    """The first step that served sample `key`: its time.monotonic(), and the prompt tokens that were found in the cache."""

    key: int
    scheduled: float
    num_cached_tokens: int


class SampleOutput(NamedTuple):
    """What a step has for sample `key`; the other fields are those of SequenceOutput."""

    key: int
    token: TokenLogprob | None
    prompt_logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    latents: bytes | None = None


class StepReport(NamedTuple):
    """One step, or an idle engine's state after it dropped its last request."""

    started: list[SampleStart]
    outputs: list[SampleOutput]
    stats: StepStats


class EngineWorker:
    """Runs one engine in a thread of its own.

    report is called in that thread after every step, with what it did; died once, should the engine fail.
    """

    def __init__(self, engine: Engine, report: Callable[[StepReport], None], died: Callable[[BaseException], None]) -> None:
        self.engine = engine
        self.last_progress = time.monotonic()
        """When the last step ended."""
        self._report, self._died = report, died
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._keys: dict[Sequence, int] = {}
        self._sequences: dict[int, Sequence] = {}
        self._thread = threading.Thread(target=self._run, name="lrt-engine", daemon=True)

    # Any thread.

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end before its next step."""
        self._commands.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def add(self, request: GenerationRequest, first_key: int) -> None:
        """Queue a request; its samples are named first_key, first_key + 1, ..."""
        self._commands.put(lambda: self._add(request, first_key))

    def finish(self, key: int, reason: FinishReason) -> None:
        """End a sample before the next step; harmless for one that has ended."""
        self._commands.put(lambda: self._finish(key, reason))

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                output = self.engine.step()
                self.last_progress = time.monotonic()
                self._report(self._name_all(output))
        except BaseException as error:
            logger.exception("the engine failed")
            self._died(error)

    def _obey(self) -> bool:
        """Carry out what was asked for, waiting while there is nothing to compute; false when told to stop."""
        while True:
            if self._commands.empty() and self.engine.has_work():
                return True
            command = self._commands.get()
            if command is None:
                return False
            command()
            if not self.engine.has_work() and self._commands.empty():
                stats = StepStats()
                self.engine.fill_gauges(stats)
                self._report(StepReport([], [], stats))

    def _add(self, request: GenerationRequest, first_key: int) -> None:
        for key, sequence in enumerate(self.engine.add(request), first_key):
            self._keys[sequence] = key
            self._sequences[key] = sequence

    def _finish(self, key: int, reason: FinishReason) -> None:
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._forget(sequence, key)
            self.engine.finish(sequence, reason)

    def _forget(self, sequence: Sequence, key: int) -> None:
        del self._sequences[key], self._keys[sequence]

    def _name_all(self, output: StepOutput) -> StepReport:
        """What a step did, its sequences under their samples' keys."""
        started = [
            SampleStart(self._keys[sequence], sequence.first_scheduled or 0.0, sequence.num_cached_prompt_tokens or 0)
            for sequence in output.started
        ]
        return StepReport(started, [self._name(item) for item in output.outputs], output.stats)

    def _name(self, item: SequenceOutput) -> SampleOutput:
        """The output under its sample's key; a sample that has ended is forgotten."""
        sequence = item.sequence
        key = self._keys[sequence]
        if item.finish_reason is not None:
            self._forget(sequence, key)
        return SampleOutput(key, item.token, item.prompt_logprobs, item.finish_reason, item.latents)
