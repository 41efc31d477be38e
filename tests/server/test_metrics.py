"""Metrics: names, types and labels as dashboards know them, and exact counts."""

from __future__ import annotations

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.config import EngineConfig
from server.engine.request import FinishReason
from server.engine.stats import RequestStats, StepStats, TokenTimes
from server.metrics import EngineMetrics, token_buckets

LABELS = {"model_name": "tiny", "engine": "0"}

COUNTERS = (
    *("num_preemptions", "recomputed_tokens", "prompt_tokens", "generation_tokens"),
    *("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens_cached"),
    *("request_success", "admission_rejections"),
)
GAUGES = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("cache_config_info", "latent_bytes", "model_load_seconds"),
)
HISTOGRAMS = (
    *("request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens", "request_params_n"),
    *("iteration_tokens_total", "refinement_passes", "refinement_residual", "engine_step_seconds"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds"),
)


def make(prefix: str = "lrt") -> EngineMetrics:
    metrics = EngineMetrics(prefix, "tiny", 64)
    metrics.describe(EngineConfig(max_model_len=64, num_blocks=10, block_size=16), "float32", 128, 1.5)
    return metrics


def finished(
    reason: FinishReason, num_tokens: int, scheduled: float | None, first: float | None, last: float | None, end: float
) -> RequestStats:
    """A sample of a prompt of 5 tokens that arrived at 1.0."""
    return RequestStats(5, num_tokens, 0, reason, 1.0, scheduled, first, last, end)


def samples(metrics: EngineMetrics) -> dict[str, float]:
    """Sample name, with its labels beyond the common two, -> value."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            assert LABELS.items() <= sample.labels.items()
            rest = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()) if key not in LABELS)
            found[sample.name + (f"[{rest}]" if rest else "")] = sample.value
    return found


@pytest.mark.parametrize("prefix", ["lrt", "vllm"])
def test_names_and_types(prefix: str) -> None:
    found = {}
    for line in make(prefix).exposition().decode().splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            found[name] = kind
    expected = {f"{prefix}:{name}_total": "counter" for name in COUNTERS}
    expected |= {f"{prefix}:{name}": "gauge" for name in GAUGES}
    expected |= {f"{prefix}:{name}": "histogram" for name in HISTOGRAMS}
    assert found == expected


def test_two_in_one_process_do_not_meet() -> None:
    first, second = make(), make()
    first.on_tokens(TokenTimes([0.1, 0.2], [0.3]))
    assert samples(first)["lrt:generation_tokens_total"] == 3
    assert samples(second)["lrt:generation_tokens_total"] == 0


def test_steps() -> None:
    metrics = make()
    metrics.on_step(
        StepStats(
            num_running=2,
            num_waiting=1,
            kv_cache_usage=0.3,
            step_seconds=0.004,
            num_scheduled_tokens=40,
            num_settled_prompt_tokens=7,
            num_preemptions=1,
            num_recomputed_tokens=5,
            num_prefix_queries=30,
            num_prefix_hits=16,
            refinement_residuals=[1e-3, 2.0],
            refinement_passes=[4.5],
        )
    )
    found = samples(metrics)
    assert found["lrt:num_requests_running"] == 2
    assert found["lrt:num_requests_waiting"] == 1
    assert found["lrt:kv_cache_usage_perc"] == 0.3
    assert found["lrt:latent_bytes"] == 0.3 * 160 * 128
    assert found["lrt:num_preemptions_total"] == 1
    assert found["lrt:recomputed_tokens_total"] == 5
    assert (found["lrt:prefix_cache_queries_total"], found["lrt:prefix_cache_hits_total"]) == (30, 16)
    assert found["lrt:prompt_tokens_total"] == 7
    assert found["lrt:iteration_tokens_total_sum"] == 40
    assert found["lrt:engine_step_seconds_bucket[le=0.0025]"] == 0
    assert found["lrt:engine_step_seconds_bucket[le=0.005]"] == 1
    assert found["lrt:refinement_residual_count"] == 2
    assert found["lrt:refinement_passes_sum"] == 4.5
    metrics.on_step(StepStats())
    found = samples(metrics)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "latent_bytes"):
        assert found[f"lrt:{name}"] == 0
    assert found["lrt:engine_step_seconds_count"] == found["lrt:iteration_tokens_total_count"] == 1


def test_a_request_from_start_to_end() -> None:
    metrics = make()
    metrics.on_request(5, 16, 2)
    metrics.on_tokens(TokenTimes([0.25], []))
    metrics.on_tokens(TokenTimes([], [0.25, 0.75]))
    metrics.on_finished(finished("stop", 3, 1.5, 2.5, 4.5, end=5.0))
    found = samples(metrics)
    sums = {
        "request_params_max_tokens": 16,
        "request_params_n": 2,
        "time_to_first_token_seconds": 0.25,
        "request_prompt_tokens": 5,
        "request_generation_tokens": 3,
        "e2e_request_latency_seconds": 4.0,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 1.0,
        "request_decode_time_seconds": 2.0,
        "request_inference_time_seconds": 3.0,
        "request_time_per_output_token_seconds": 1.0,
    }
    for name, value in sums.items():
        assert (found[f"lrt:{name}_sum"], found[f"lrt:{name}_count"]) == (value, 1), name
    assert (found["lrt:inter_token_latency_seconds_sum"], found["lrt:inter_token_latency_seconds_count"]) == (1.0, 2)
    assert found["lrt:generation_tokens_total"] == 3
    assert found["lrt:request_success_total[finished_reason=stop]"] == 1
    assert found["lrt:request_success_total[finished_reason=length]"] == 0


def test_times_that_never_came_are_not_counted() -> None:
    metrics = make()
    metrics.on_finished(finished("abort", 0, None, None, None, end=2.0))
    metrics.on_finished(finished("length", 1, 1.5, 2.0, 2.0, end=2.0))
    found = samples(metrics)
    assert found["lrt:request_success_total[finished_reason=abort]"] == 1
    assert found["lrt:e2e_request_latency_seconds_count"] == 2
    assert found["lrt:request_queue_time_seconds_count"] == 1
    assert found["lrt:request_decode_time_seconds_count"] == 1
    assert found["lrt:request_time_per_output_token_seconds_count"] == 0


def test_rejections_and_the_cache() -> None:
    metrics = make()
    metrics.on_rejection("queue_full")
    found = samples(metrics)
    assert found["lrt:admission_rejections_total[reason=queue_full]"] == 1
    assert found["lrt:admission_rejections_total[reason=draining]"] == 0
    assert found["lrt:model_load_seconds"] == 1.5
    (info,) = [name for name in found if name.startswith("lrt:cache_config_info")]
    assert "block_size=16" in info and "num_gpu_blocks=10" in info and "prefill=window" in info


def test_buckets() -> None:
    assert token_buckets(64) == (1, 2, 5, 10, 20, 50)
    assert token_buckets(1) == (1,)
    assert token_buckets(2000) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    bounds = [name for name in samples(make()) if name.startswith("lrt:time_to_first_token_seconds_bucket")]
    below = [float(bound.split("=")[1].rstrip("]")) for bound in bounds]
    assert sum(bound < 0.01 for bound in below) >= 5 and math.inf in below and 2560.0 in below
