"""The engine's front door for an event loop: requests in, streams of `Delta` out.

The engine runs in a thread of its own. Commands reach it through a queue between steps; its outputs return to the loop, where
text is made from tokens and stop strings are found, off the engine's critical path. A sample that a stop string ended may
compute one token more before the engine hears of it; that token is never delivered or counted.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC

from lrt_core.tokenizer import Tokenizer
from server.engine.engine import Engine, SequenceOutput, StepOutput
from server.engine.request import AdmissionError, Delta, FinishReason, GenerationRequest, RequestError
from server.engine.sample import Sample
from server.engine.sequence import Sequence
from server.engine.stats import EngineObserver, NullObserver, StepStats

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine's thread failed; no request can be served any more."""


class RequestStream:
    """Async iterator over one request's deltas. Closing it, or cancelling the task that waits on it, aborts the request."""

    def __init__(self, request: GenerationRequest, owner: AsyncEngine, arrival: float) -> None:
        self.request = request
        self._owner = owner
        self._queue: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        self.samples = [Sample(request, index, owner.tokenizer, arrival) for index in range(request.n)]
        self._undelivered = request.n

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        if self._undelivered == 0 and self._queue.empty():
            raise StopAsyncIteration
        try:
            item = await self._queue.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, BaseException):
            self._undelivered = 0
            raise item
        if item.finish_reason is not None:
            self._undelivered -= 1
        return item

    async def aclose(self) -> None:
        """Abort what is unfinished and free its blocks within a step; harmless when all is done."""
        self._owner.abort(self)

    def push(self, item: Delta | BaseException) -> None:
        """Hand the consumer something (event loop only)."""
        self._queue.put_nowait(item)


class AsyncEngine:
    """Admission, delivery and lifetime of one `Engine`.

    All methods belong to the event loop that called `start`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        observer: EngineObserver | None = None,
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.config, self.model_config = engine.config, engine.runner.model.config
        self.observer: EngineObserver = observer or NullObserver()
        self.error: BaseException | None = None
        self.is_draining = False
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: set[RequestStream] = set()
        self._consumers: dict[Sequence, tuple[RequestStream, Sample]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last_progress = time.monotonic()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread is not None and not self.is_draining and self.error is None

    @property
    def num_in_flight(self) -> int:
        """Requests admitted and not over."""
        return len(self._streams)

    @property
    def last_step_age(self) -> float:
        """Seconds since the engine last got on while it has work; 0 when idle."""
        return time.monotonic() - self._last_progress if self._streams else 0.0

    async def start(self) -> None:
        """Start the engine's thread."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="lrt-engine", daemon=True)
        self._thread.start()

    async def stop(self, drain: bool = True) -> None:
        """Refuse new requests, finish what runs (or abort it: drain=False), then stop the thread. Idempotent."""
        self.is_draining = True
        if not drain:
            for stream in list(self._streams):
                self.abort(stream)
        await self._idle.wait()
        if self._thread is not None:
            self._commands.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def admit(self, request: GenerationRequest) -> RequestStream:
        """Queue a request and return its stream; raises as `admit_all`."""
        return self.admit_all([request])[0]

    def admit_all(self, requests: SequenceABC[GenerationRequest]) -> list[RequestStream]:
        """Queue requests that belong together, all or none, and return their streams.

        Raises PromptTooLongError or RequestError when they can never be served, AdmissionError when not now.
        """
        for request in requests:
            self.engine.check(request)
        num_samples = sum(request.n for request in requests)
        if num_samples > self.config.max_num_admitted:
            raise RequestError(f"{num_samples} samples in one request, the server takes {self.config.max_num_admitted} in all")
        self._refuse_if_unable(num_samples)
        return [self._admit(request) for request in requests]

    def _admit(self, request: GenerationRequest) -> RequestStream:
        now = time.monotonic()
        if not self._streams:
            self._last_progress = now
        stream = RequestStream(request, self, now)
        self._streams.add(stream)
        self._idle.clear()
        self.observer.on_request(len(request.prompt_ids), request.stopping.max_tokens, request.n)
        self._commands.put(lambda: self._add(stream))
        return stream

    def abort(self, stream: RequestStream) -> None:
        """End a request's unfinished samples with reason `abort`."""
        if stream in self._streams:
            for sample in stream.samples:
                if not sample.finished:
                    self._finish_sample(stream, sample, Delta(sample.index, finish_reason="abort"))

    def _refuse_if_unable(self, num_samples: int) -> None:
        refusal: AdmissionError | None = None
        if self.is_draining and self.error is None:
            refusal = AdmissionError("draining", "the server is shutting down and takes no new requests")
        elif self.error is not None or self._thread is None:
            refusal = AdmissionError("engine_dead", "the engine is not running")
        elif self._num_unfinished() + num_samples > self.config.max_num_admitted:
            refusal = AdmissionError("queue_full", "too many requests are waiting; try again later")
        if refusal is not None:
            self.observer.on_rejection(refusal.reason)
            raise refusal

    def _num_unfinished(self) -> int:
        return sum(not sample.finished for stream in self._streams for sample in stream.samples)

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                output = self.engine.step()
                self._last_progress = time.monotonic()
                self.observer.on_step(output.stats)
                if output.outputs:
                    self._call_loop(lambda output=output: self._deliver(output))  # type: ignore[misc]
        except BaseException as error:
            logger.exception("the engine failed")
            self.error = error
            self._call_loop(self._die)

    def _obey(self) -> bool:
        """Carry out what the loop asked for, waiting while there is nothing to compute; false when told to stop."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work())
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            if not self.engine.has_work() and self._commands.empty():
                stats = StepStats()
                self.engine.fill_gauges(stats)
                self.observer.on_step(stats)

    def _add(self, stream: RequestStream) -> None:
        sequences = self.engine.add(stream.request)
        for sequence, sample in zip(sequences, stream.samples, strict=True):
            self._consumers[sequence] = (stream, sample)
            sample.sequence = sequence
            if sample.finished:
                self._release(sequence, "abort")

    def _release(self, sequence: Sequence, reason: FinishReason) -> None:
        self.engine.finish(sequence, reason)
        self._consumers.pop(sequence, None)

    def _call_loop(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            logger.warning("the event loop is closed; the engine stops")
            self._commands.put(None)

    # The event loop.

    def _deliver(self, output: StepOutput) -> None:
        for item in output.outputs:
            consumer = self._consumers.get(item.sequence)
            if consumer is not None and not consumer[1].finished:
                self._deliver_one(*consumer, item)

    def _deliver_one(self, stream: RequestStream, sample: Sample, item: SequenceOutput) -> None:
        if item.token is not None:
            self.observer.on_tokens(1, *sample.count_token(time.monotonic()))
        delta = sample.make_delta(item)
        if delta.finish_reason is not None:
            self._finish_sample(stream, sample, delta)
        else:
            stream.push(delta)

    def _finish_sample(self, stream: RequestStream, sample: Sample, delta: Delta) -> None:
        assert delta.finish_reason is not None
        sample.finished = True
        self.observer.on_finished(sample.stats(delta.finish_reason, time.monotonic()))
        stream.push(delta)
        if sample.sequence is not None:
            sequence, reason = sample.sequence, delta.finish_reason
            self._commands.put(lambda: self._release(sequence, reason))
        self._forget_if_over(stream)

    def _forget_if_over(self, stream: RequestStream) -> None:
        if all(sample.finished for sample in stream.samples):
            self._streams.discard(stream)
            if not self._streams:
                self._idle.set()

    def _die(self) -> None:
        error = EngineDeadError("the engine failed")
        for stream in list(self._streams):
            for sample in stream.samples:
                sample.finished = True
            stream.push(error)
            self._streams.discard(stream)
        self._idle.set()
