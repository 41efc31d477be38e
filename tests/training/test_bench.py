"""The bench of training: its arithmetic, its JSON, and the way there from `lrt-bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.bench.__main__ import main as lrt_bench
from training.bench import SCHEDULES, Setup, Shape, main, make_step, summary

TINY = ["--batch-size", "1", "--sequence-len", "16", "--num-layers", "1", "--hidden-size", "64", "--vocab-size", "64"]


def test_medians_and_ratios_within_a_turn() -> None:
    seconds = {"baseline": [1.0, 2.0, 4.0], "interleaved": [2.0, 4.2, 10.0]}
    table = summary(seconds, {"baseline": 100, "interleaved": 150}, 8)
    row = table["interleaved"]
    assert row["tokens_per_second"] == pytest.approx(8 / 4.2)
    assert row["step_ratio_to_baseline"] == pytest.approx(2.1)
    assert (row["step_ratio_to_baseline_low"], row["step_ratio_to_baseline_high"]) == (2.0, 2.5)
    assert row["memory_ratio_to_baseline"] == 1.5
    assert table["baseline"]["step_ratio_to_baseline"] == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_step_runs(name: str, dtype: str) -> None:
    setup = Setup(Shape(2, 16, 2, 64, 64), "layerwise", dtype, compile=False, recompute=False)
    assert make_step(setup, name)() > 0


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "train.json"
    assert main([*TINY, "--repetitions", "2", "--threads", "1", "--schedules", "chunked", "--json", str(target)]) == 0
    results = json.loads(target.read_text())
    assert list(results["schedules"]) == ["baseline", "chunked"]
    row = results["schedules"]["chunked"]
    assert row["tokens_per_second"] > 0 and row["step_ratio_to_baseline"] > 0
    assert row["peak_memory_bytes"] >= 0 and len(row["step_seconds"]) == 2
    assert results["limits"]["gemm_float32_gflop_s"] > 0
    assert "x baseline" in capsys.readouterr().out


@pytest.mark.slow
def test_lrt_bench_hands_on(tmp_path: Path) -> None:
    target = tmp_path / "train.json"
    flags = [*TINY, "--repetitions", "1", "--threads", "1", "--no-memory", "--schedules", "baseline", "--json", str(target)]
    assert lrt_bench(["train", *flags]) == 0
    assert json.loads(target.read_text())["mode"] == "train"
    assert lrt_bench(["train", "--repetitions", "0"]) == 2
