"""The engine's front door for an event loop: requests in, streams of `Delta` out.

The engine runs in a thread of its own (`worker.py`). Its steps return to the loop, where text is made from tokens, stop strings
are found and everything is counted while the next step computes. However far the loop lags behind, one turn of it takes in all
that has arrived. A sample that a stop string ended may compute one token more before the engine hears of it; that token is
never delivered or counted.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC

from lrt_core.grammar import Grammar, GrammarSource
from lrt_core.tokenizer import Tokenizer
from server.engine.engine import NOT_FINITE, Engine
from server.engine.grammars import GrammarCache
from server.engine.request import AdmissionError, Delta, GenerationRequest, NotFiniteError, RequestError
from server.engine.sample import Sample
from server.engine.stats import EngineObserver, NullObserver, TokenTimes
from server.engine.stream import DeltaStream
from server.engine.worker import EngineWorker, SampleOutput, StepReport

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine's thread failed; no request can be served any more."""


class RequestStream(DeltaStream):
    """One request's deltas. Closing it, or cancelling the task that waits on it, aborts the request.

    first_key: of its samples' names, which count up from it.
    """

    def __init__(self, request: GenerationRequest, owner: AsyncEngine, arrival: float, first_key: int) -> None:
        super().__init__(request.n)
        self.request = request
        self._owner = owner
        self.samples = [Sample(request, index, owner.tokenizer, arrival, first_key + index) for index in range(request.n)]

    async def aclose(self) -> None:
        """Abort what is unfinished and free its blocks within a step; harmless when all is done."""
        self._owner.abort(self)


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
        self.grammars = GrammarCache(tokenizer, engine.eos_ids)
        self._worker: EngineWorker | None = None
        self._streams: set[RequestStream] = set()
        self._consumers: dict[int, tuple[RequestStream, Sample]] = {}
        """Unfinished samples by key."""
        self._keys = itertools.count()
        self._reports: deque[StepReport] = deque()
        """What the worker has reported and the loop not taken in."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._busy_since = time.monotonic()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._worker is not None and not self.is_draining and self.error is None

    @property
    def num_in_flight(self) -> int:
        """Requests admitted and not over."""
        return len(self._streams)

    @property
    def last_step_age(self) -> float:
        """Seconds since the engine last got on while it has work; 0 when idle."""
        if not self._streams or self._worker is None:
            return 0.0
        return time.monotonic() - max(self._busy_since, self._worker.last_progress)

    async def start(self) -> None:
        """Start the engine's thread."""
        self._loop = asyncio.get_running_loop()
        self._worker = EngineWorker(self.engine, self._take_report, self._take_death)
        self._worker.start()
        if self.grammars.is_closed:
            self.grammars = GrammarCache(self.tokenizer, self.engine.eos_ids)

    async def stop(self, drain: bool = True) -> None:
        """Refuse new requests, finish what runs (or abort it: drain=False), then stop the thread. Idempotent."""
        self.is_draining = True
        if not drain:
            for stream in list(self._streams):
                self.abort(stream)
        await self._idle.wait()
        if self._worker is not None:
            self._worker.stop()
            await asyncio.to_thread(self._worker.join)
            self._worker = None
            await self.grammars.close()

    async def compile(self, source: GrammarSource) -> Grammar:
        """What a request's `grammar` has to be; one that waits for it counts among those that wait. Raises GrammarError, or
        AdmissionError when no request is taken."""
        self._refuse_if_unable(self.grammars.num_waiting + 1)
        try:
            return await self.grammars.get(source)
        except AdmissionError as refusal:
            self.observer.on_rejection(refusal.reason)
            raise

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
        assert self._worker is not None
        now = time.monotonic()
        if not self._streams:
            self._busy_since = now
        keys = [next(self._keys) for _ in range(request.n)]
        stream = RequestStream(request, self, now, keys[0])
        self._streams.add(stream)
        self._consumers.update((sample.key, (stream, sample)) for sample in stream.samples)
        self._idle.clear()
        self.observer.on_request(len(request.prompt_ids), request.stopping.max_tokens, request.n)
        self._worker.add(request, keys[0])
        return stream

    def abort(self, stream: RequestStream) -> None:
        """End a request's unfinished samples with reason `abort`."""
        if stream in self._streams:
            assert self._worker is not None
            for sample in stream.samples:
                if sample.key in self._consumers:
                    self._worker.finish(sample.key, "abort")
                    self._end(stream, sample, Delta(sample.index, finish_reason="abort"), time.monotonic())

    def _refuse_if_unable(self, num_samples: int) -> None:
        refusal: AdmissionError | None = None
        if self.is_draining and self.error is None:
            refusal = AdmissionError("draining", "the server is shutting down and takes no new requests")
        elif self.error is not None or self._worker is None:
            refusal = AdmissionError("engine_dead", "the engine is not running")
        elif len(self._consumers) + num_samples > self.config.max_num_admitted:
            refusal = AdmissionError("queue_full", "too many requests are waiting; try again later")
        if refusal is not None:
            self.observer.on_rejection(refusal.reason)
            raise refusal

    # The engine's thread.

    def _take_report(self, report: StepReport) -> None:
        self._reports.append(report)
        if len(self._reports) == 1:  # else the loop has been woken and not come yet
            self._call_loop(self._deliver)

    def _take_death(self, error: BaseException) -> None:
        self.error = error
        self._call_loop(self._die)

    def _call_loop(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None and self._worker is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            logger.warning("the event loop is closed; the engine stops")
            self._worker.stop()

    # The event loop.

    def _deliver(self) -> None:
        """Take in every report; what goes wrong here would go on going wrong, so it ends the engine."""
        try:
            while self._reports:
                self._take_in(self._reports[0])
                self._reports.popleft()  # only now: until it is empty the worker need not wake the loop
        except Exception as error:
            logger.exception("delivering a step failed")
            assert self._worker is not None
            self._worker.stop()
            self.error = error
            self._die()

    def _take_in(self, report: StepReport) -> None:
        """Hand a step's outputs to their streams and count it."""
        times, now = TokenTimes(), time.monotonic()
        for start in report.started:
            if start.key in self._consumers:
                self._consumers[start.key][1].start(start)
        for item in report.outputs:
            consumer = self._consumers.get(item.key)
            if consumer is not None:
                self._deliver_one(*consumer, item, now, times)
        self.observer.on_step(report.stats)
        if times.num_tokens:
            self.observer.on_tokens(times)

    def _deliver_one(self, stream: RequestStream, sample: Sample, item: SampleOutput, now: float, times: TokenTimes) -> None:
        if item.token is not None:
            sample.count_token(now, times)
        delta = sample.make_delta(item)
        if item.error is not None and delta.finish_reason == "abort":
            delta.error = self._failure(stream.request, item.error)
        if delta.finish_reason is None:
            stream.push(delta)
            return
        if item.finish_reason is None:  # a stop string, of which the engine knows nothing
            assert self._worker is not None
            self._worker.finish(sample.key, delta.finish_reason)
        self._end(stream, sample, delta, now)

    def _failure(self, request: GenerationRequest, message: str) -> RequestError | NotFiniteError:
        """What became of a sample whose grammar or model has failed; the others of its request go on."""
        grammar = request.grammar
        if grammar is None or message == NOT_FINITE:
            logger.error("request %s: %s", request.request_id, message)
            return NotFiniteError(message)
        self.grammars.forget(grammar.source)
        return RequestError(f"'{grammar.source.origin}' cannot be followed further: {message}", grammar.source.origin)

    def _end(self, stream: RequestStream, sample: Sample, last: Delta, now: float) -> None:
        """A sample's last delta."""
        assert last.finish_reason is not None
        del self._consumers[sample.key]
        self.observer.on_finished(sample.stats(last.finish_reason, now))
        stream.push(last)
        if not any(sample.key in self._consumers for sample in stream.samples):
            self._discard(stream)

    def _discard(self, stream: RequestStream) -> None:
        self._streams.discard(stream)
        if not self._streams:
            self._idle.set()

    def _die(self) -> None:
        error = EngineDeadError("the engine failed")
        self._consumers.clear()
        for stream in self._streams:
            stream.fail(error)
        self._streams.clear()
        self._idle.set()
