"""What the engine reports, as Prometheus metrics: vLLM's names, types and labels where the meaning is the same, and our own.

A registry per object, nothing global. Neighbours: `engine/stats.py` defines what arrives, `api/routes.py` serves the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.engine.config import EngineConfig
from server.engine.request import FinishReason
from server.engine.stats import RequestStats, StepStats, TokenTimes

LABELS = ("model_name", "engine")
_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.0075)
"""Buckets in seconds below vLLM's first: small models answer there."""
_FIRST_TOKEN = (*_FAST, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_PER_TOKEN = (*_FAST, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_PER_REQUEST = (
    *(*_FAST, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480),
    *(960, 1920, 7680),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_PASSES = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 50, 100)
_RESIDUALS = tuple(float(f"1e{exponent}") for exponent in range(-8, 2))


def token_buckets(largest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `largest` tokens."""
    buckets = [mantissa * 10**exponent for exponent in range(len(str(largest))) for mantissa in (1, 2, 5)]
    return tuple(bucket for bucket in buckets if bucket <= largest)


class EngineMetrics:
    """An `EngineObserver` that counts. Thread-safe.

    prefix: of every name. model_name: the label's value. max_model_len bounds the buckets of token counts.
    """

    def __init__(self, prefix: str, model_name: str, max_model_len: int) -> None:
        self.registry = CollectorRegistry()
        self._prefix, self._label_values = prefix, (model_name, "0")
        self._latent_capacity = 0
        self._add_gauges()
        self._add_counters()
        self._add_token_histograms(token_buckets(max_model_len))
        self._add_time_histograms()

    def describe(self, config: EngineConfig, dtype: str, latent_size: int, load_seconds: float) -> None:
        """Tell what was loaded. latent_size: bytes of one token's latent in the pool."""
        self._latent_capacity = config.capacity * latent_size
        self._gauge("model_load_seconds", "Seconds it took to load the model.").set(load_seconds)
        details = {
            "block_size": config.block_size,
            "cache_dtype": dtype,
            "enable_prefix_caching": config.prefix_caching,
            "num_gpu_blocks": config.num_blocks,
            "prefill": config.prefill,
            "tolerance": config.tolerance,
            "window": config.window,
        }
        name = f"{self._prefix}:cache_config_info"
        info = Gauge(name, "How the cache is set up.", (*LABELS, *details), registry=self.registry)
        info.labels(*self._label_values, *map(str, details.values())).set(1)

    def exposition(self) -> bytes:
        """The metrics page."""
        return generate_latest(_WithoutCreationTimes(self.registry))

    def on_step(self, stats: StepStats) -> None:
        """See EngineObserver."""
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._usage.set(stats.kv_cache_usage)
        self._latent_bytes.set(round(stats.kv_cache_usage * self._latent_capacity))
        self._preemptions.inc(stats.num_preemptions)
        self._recomputed.inc(stats.num_recomputed_tokens)
        self._prompt_tokens.inc(stats.num_settled_prompt_tokens)
        self._prefix_queries.inc(stats.num_prefix_queries)
        self._prefix_hits.inc(stats.num_prefix_hits)
        self._cached_prompt_tokens.inc(stats.num_prefix_hits)
        if stats.num_scheduled_tokens > 0:
            self._step_tokens.observe(stats.num_scheduled_tokens)
        if stats.num_scheduled_tokens > 0 or stats.num_scored_tokens > 0:
            self._step_seconds.observe(stats.step_seconds)
        for residual in stats.refinement_residuals:
            self._residuals.observe(residual)
        for passes in stats.refinement_passes:
            self._passes.observe(passes)

    def on_request(self, prompt_tokens: int, max_tokens: int, n: int) -> None:
        """See EngineObserver."""
        self._params_max_tokens.observe(max_tokens)
        self._params_n.observe(n)

    def on_rejection(self, reason: str) -> None:
        """See EngineObserver."""
        self._rejections.labels(*self._label_values, reason).inc()

    def on_tokens(self, times: TokenTimes) -> None:
        """See EngineObserver."""
        self._generation_tokens.inc(times.num_tokens)
        for seconds in times.since_arrival:
            self._first_token.observe(seconds)
        for seconds in times.since_previous:
            self._inter_token.observe(seconds)

    def on_finished(self, stats: RequestStats) -> None:
        """See EngineObserver."""
        self._success.labels(*self._label_values, stats.finish_reason).inc()
        self._request_prompt_tokens.observe(stats.prompt_tokens)
        self._request_generation_tokens.observe(stats.generation_tokens)
        self._end_to_end.observe(stats.finished - stats.arrival)
        _observe_interval(self._queue, stats.arrival, stats.scheduled)
        _observe_interval(self._prefill, stats.scheduled, stats.first_token)
        _observe_interval(self._decode, stats.first_token, stats.last_token)
        _observe_interval(self._inference, stats.scheduled, stats.last_token)
        if stats.first_token is not None and stats.last_token is not None and stats.generation_tokens > 1:
            self._per_token.observe((stats.last_token - stats.first_token) / (stats.generation_tokens - 1))

    def _gauge(self, name: str, documentation: str) -> Gauge:
        gauge = Gauge(f"{self._prefix}:{name}", documentation, LABELS, registry=self.registry)
        return gauge.labels(*self._label_values)

    def _counter(self, name: str, documentation: str) -> Counter:
        counter = Counter(f"{self._prefix}:{name}", documentation, LABELS, registry=self.registry)
        return counter.labels(*self._label_values)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        name = f"{self._prefix}:{name}"
        histogram = Histogram(name, documentation, LABELS, registry=self.registry, buckets=buckets)
        return histogram.labels(*self._label_values)

    def _add_gauges(self) -> None:
        self._running = self._gauge("num_requests_running", "Sequences that run.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait to run.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the cache's blocks in use; 1 is all of them.")
        self._latent_bytes = self._gauge("latent_bytes", "Bytes of latents in the blocks in use.")

    def _add_counters(self) -> None:
        self._preemptions = self._counter("num_preemptions", "Times a running sequence lost its blocks to another.")
        self._recomputed = self._counter("recomputed_tokens", "Tokens computed again after a preemption.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens read.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._cached_prompt_tokens = self._counter("prompt_tokens_cached", "Prompt tokens taken from the cache, not computed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        name = f"{self._prefix}:request_success"
        self._success = Counter(name, "Samples that ended, by reason.", (*LABELS, "finished_reason"), registry=self.registry)
        for finished_reason in get_args(FinishReason):
            self._success.labels(*self._label_values, finished_reason)
        name = f"{self._prefix}:admission_rejections"
        self._rejections = Counter(name, "Requests refused, by reason.", (*LABELS, "reason"), registry=self.registry)
        for reason in ("queue_full", "draining", "engine_dead"):
            self._rejections.labels(*self._label_values, reason)

    def _add_token_histograms(self, buckets: Sequence[float]) -> None:
        self._request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a sample.", buckets)
        self._request_generation_tokens = self._histogram("request_generation_tokens", "Tokens a sample generated.", buckets)
        self._params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", buckets)
        self._params_n = self._histogram("request_params_n", "n of a request.", (1, 2, 5, 10, 20))
        self._step_tokens = self._histogram("iteration_tokens_total", "Rows of a step's forward.", _STEP_TOKENS)
        self._passes = self._histogram("refinement_passes", "Rows computed per token of a prompt.", _PASSES)
        self._residuals = self._histogram("refinement_residual", "Change of a window's latents in a pass.", _RESIDUALS)

    def _add_time_histograms(self) -> None:
        add, request = self._histogram, _PER_REQUEST
        self._first_token = add("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN)
        self._inter_token = add("inter_token_latency_seconds", "Between two tokens.", _PER_TOKEN)
        self._per_token = add("request_time_per_output_token_seconds", "A sample's mean time between tokens.", _PER_TOKEN)
        self._step_seconds = add("engine_step_seconds", "Wall time of an engine step.", _PER_TOKEN)
        self._end_to_end = add("e2e_request_latency_seconds", "From arrival to the end.", request)
        self._queue = add("request_queue_time_seconds", "From arrival to the first step.", request)
        self._prefill = add("request_prefill_time_seconds", "From the first step to the first token.", request)
        self._decode = add("request_decode_time_seconds", "From the first token to the last.", request)
        self._inference = add("request_inference_time_seconds", "From the first step to the last token.", request)


def _observe_interval(histogram: Histogram, start: float | None, end: float | None) -> None:
    if start is not None and end is not None:
        histogram.observe(end - start)


class _WithoutCreationTimes(CollectorRegistry):
    """A view of a registry that leaves out the `_created` samples, which the client library can only switch off globally."""

    def __init__(self, source: Collector) -> None:
        super().__init__()
        self._source = source

    def collect(self) -> Iterator[Metric]:
        for metric in self._source.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
