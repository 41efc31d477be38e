"""`lrt-train study`: its runs, going on after it was stopped, and the figures of its report against ones made by hand."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training.schedules.registry import cost
from training.study import report, table
from training.study.__main__ import main
from training.study.cells import Surroundings
from training.study.plan import BASELINE, PLANS, Cell, StudyError, chosen
from training.study.runner import RESULTS_FILE, Runner, claim, read_results

RECURRENT = "interleaved-layerwise-last"
SMALL = ["--plan", "tiny", "--variants", BASELINE, RECURRENT, "--threads", "1"]


def study(data: Path, out: Path, *more: str) -> int:
    return main([*SMALL, "--data", str(data), "--out", str(out), *more])


def result(variant: str, budget: float, bpb: float, *, cost: int = 1, seed: int = 0) -> dict[str, Any]:
    tokens = int(1000 * budget)
    return {
        "cell": f"{variant}_{budget:g}_{seed}",
        "variant": variant,
        "seed": seed,
        "schedule": "any",
        "tokens_per_parameter": budget,
        "parameters": 1000,
        "steps": tokens // 10,
        "tokens": tokens,
        "forwards_per_step": cost,
        "effective_tokens": cost * tokens,
        "seconds": 1.0,
        "sequential_bpb": bpb,
        "merged_bpb": bpb + 0.001,
        "contraction": None if cost == 1 else 0.25,
        "evaluated_tokens": 512,
    }


TIMING = {"clock": {BASELINE: [0.1, 0.1, 9.0], "other": [0.4]}, "sundial": {"other": [7.0]}}


def test_costs_are_those_of_the_schedules() -> None:
    assert [cost("baseline", {}), cost("chunked", {}), cost("interleaved", {"num_subsets": 3})] == [1, 1, 2]
    assert [cost("multi_refine", {}), cost("multi_refine", {"num_refinements": 4})] == [3, 5]
    with pytest.raises(ValueError, match="no option"):
        cost("baseline", {"num_subsets": 2})


def test_the_plan_holds_what_the_paper_varies() -> None:
    plan = PLANS["million"]()
    assert 0.9e6 < plan.num_parameters(1024) < 1.3e6
    recurrences = [variant.recurrence for variant in plan.variants if variant.recurrence is not None]
    assert {one.variant for one in recurrences} == {"layerwise", "shared"}
    assert {one.source_layer for one in recurrences} == {3, 5}
    pathways = {(one.residual_injection, one.kv_projection) for one in recurrences}
    assert pathways == {(True, True), (True, False), (False, True)}
    assert {variant.schedule for variant in plan.variants} == {"baseline", "interleaved", "multi_refine", "chunked"}
    most = max(cell.tokens_per_parameter * cell.variant.cost for cell in plan.cells())
    assert max(plan.variants[0].budgets) == most  # the plain model is there at the others' effective compute
    config = plan.config(Cell(plan.variants[1], 10.0, 1), 1000)
    tokens = config.num_steps * config.batch_size * config.model.sequence_len
    assert tokens == pytest.approx(10 * plan.num_parameters(1000), rel=0.01)
    assert (config.seed, config.model.vocab_size) == (1, 1000)


def test_choosing_runs() -> None:
    plan = chosen(PLANS["tiny"](), [BASELINE], [2.0, 1.0], 2)
    assert [cell.name for cell in plan.cells()] == ["baseline_1_0", "baseline_2_0", "baseline_1_1", "baseline_2_1"]
    for variants, budgets, seeds, message in (
        (["other"], None, None, "no variant 'other'"),
        (None, [0.0], None, "above 0"),
        (None, None, 0, "one seed"),
    ):
        with pytest.raises(StudyError, match=message):
            chosen(PLANS["tiny"](), variants, budgets, seeds)


def test_figures_of_the_report(tmp_path: Path) -> None:
    plain = [result(BASELINE, 1, 2.0), result(BASELINE, 4, 1.6), result(BASELINE, 4, 1.62, seed=1)]
    other = [result("other", 1, 1.75, cost=2), result("other", 2, 1.7, cost=2), result("other", 4, 1.5, cost=2)]
    rows = table.tabulate([*other, *plain], TIMING)
    order = [(BASELINE, 1), (BASELINE, 4), ("other", 1), ("other", 2), ("other", 4)]
    assert [(row.variant, row.tokens_per_parameter) for row in rows] == order
    assert (rows[1].sequential, rows[1].num_seeds) == (pytest.approx(1.61), 2)
    assert rows[1].spread == pytest.approx(0.02) and rows[0].spread is None
    assert rows[0].costs == {
        "tokens": 1000,
        "compute": 1000,
        "time on clock": pytest.approx(100 * 0.1),
    }  # the median step, not the mean
    first, second, third = table.compare(rows)
    assert first.differences == {
        "tokens": pytest.approx(1.75 - 2.0),
        "compute": pytest.approx(1.75 - (2.0 + 1.6) / 2),  # 2000 tokens: half way from 1000 to 4000, of one seed
        "time on clock": pytest.approx(1.75 - 1.6),  # 40 seconds, where the plain model had its 4000 tokens
        "time on sundial": None,
    }
    assert second.differences["tokens"] == pytest.approx(1.7 - (2.0 + 1.6) / 2)
    assert list(third.differences.values()) == [pytest.approx(1.5 - 1.6), None, None, None]
    files = {path.name: path for path in report.write(tmp_path, [*plain, *other], TIMING, num_missing=3)}
    text = files["report.md"].read_text()
    assert "**3 runs of the plan are missing.**" in text
    assert "| other | 1 | -0.2500 | -0.0500 | +0.1500 | - |" in text
    assert "At equal compute the recurrence wins 1 and loses 1 of 2" in text
    with files["results.csv"].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["sequential_bpb"]) for line in lines] == [2.0, 1.6, 1.62, 1.75, 1.7, 1.5]
    assert files["compute.png"].read_bytes()[:4] == files["time.png"].read_bytes()[:4] == b"\x89PNG"


def test_the_plain_model_between_its_budgets() -> None:
    points = [(2.0**k, 3.0 - k + k * k / 8) for k in (0, 1, 2, 4)]
    assert table.interpolated(points, 2.0**1.5) == pytest.approx(3.0 - 1.5 + 1.5**2 / 8), "a parabola over log x is met"
    assert table.interpolated(points, 2.0) == pytest.approx(2.125)
    uneven = [(x, x**-0.3) for x in (1.0, 1.5, 2.25, 100.0)]
    assert table.interpolated(uneven, 7.0) == pytest.approx(7.0**-0.3, abs=0.04), "both neighbours count, however far"
    assert table.interpolated(points, 16.2) == table.interpolated(points, 16.0) == pytest.approx(1.0)
    assert table.interpolated(points, 17.0) is None and table.interpolated(points, 0.9) is None
    assert table.interpolated([(100, 1.0), (100, 0.9), (200, 0.8)], 100) == pytest.approx(0.95)
    assert table.interpolated([(100, 1.0)], 100) == 1.0 and table.interpolated([], 1.0) is None


def test_verdicts_without_a_second_seed_name_no_winner(tmp_path: Path) -> None:
    results = [result(BASELINE, 1, 2.0), result(BASELINE, 2, 1.9), result("other", 1, 1.85, cost=2)]
    text = report.write(tmp_path, results, TIMING, num_missing=0)[1].read_text()
    assert "below the plain model in 1 and above it in 0 of 1 comparisons; how far seeds differ is not known" in text
    assert "wins" not in text.partition("## Beside the plain model")[2].partition("so long.")[2]


def test_steps_are_timed_in_turns_with_all_that_they_are_compared_with(tmp_path: Path) -> None:
    timed: list[list[str]] = []

    class Pool:
        def submit(self, work: Any, *given: Any) -> Future[Any]:
            future = Future[Any]()
            if given:
                timed.append([variant.name for variant in given[0].variants])
            future.set_result({name: [0.1 * len(timed)] for name in timed[-1]} if given else "clock")
            return future

    plans = [chosen(PLANS["tiny"](), names) for names in ([BASELINE], [BASELINE, RECURRENT], [BASELINE, RECURRENT])]
    for plan in plans:
        Runner(plan, Surroundings(tmp_path, Any, Any, "cpu", 1, False), 2)._time(Pool())  # type: ignore[arg-type]
    assert timed == [[BASELINE], [BASELINE, RECURRENT]]
    assert json.loads((tmp_path / "timing.json").read_text()) == {"clock": {BASELINE: [0.2], RECURRENT: [0.2]}}


def test_from_data_to_report_and_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert study(data, out, "--budgets", "0.01", "--jobs", "2", "--keep-checkpoints") == 0
    results = {one["variant"]: one for one in read_results(out)}
    assert set(results) == {BASELINE, RECURRENT}
    plain, recurrent = results[BASELINE], results[RECURRENT]
    assert plain["effective_tokens"] == plain["tokens"] and recurrent["effective_tokens"] == 2 * recurrent["tokens"]
    assert plain["sequential_bpb"] == pytest.approx(plain["merged_bpb"], abs=1e-4)
    assert all(math.isfinite(one["sequential_bpb"]) and one["sequential_bpb"] > 1 for one in results.values())
    assert len(recurrent["parallel_bpb"]) == 3 and recurrent["contraction"] is not None
    assert not any((out / "cells").iterdir())
    assert (out / "checkpoints" / f"{RECURRENT}_0.01_0" / "config.json").exists()
    assert str(out / "report.md") in capsys.readouterr().out
    before = (out / RESULTS_FILE).read_text()
    # More runs: these alone are trained. One cannot be: a file is where its folder should go.
    (out / "cells" / f"{BASELINE}_0.02_0").write_text("in the way")
    assert study(data, out, "--budgets", "0.01", "0.02") == 1
    assert f"{BASELINE}_0.02_0 failed" in capsys.readouterr().err
    after = (out / RESULTS_FILE).read_text()
    assert after.startswith(before) and [one["cell"] for one in read_results(out)[2:]] == [f"{RECURRENT}_0.02_0"]
    (data / "0.py").write_text("value = 1\n" * 200)
    assert study(data, out) == 1  # before any process is started
    assert "holds a study with other data" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_keeps_the_state_of_the_run_in_hand(data: Path, tmp_path: Path) -> None:
    small = ["--plan", "tiny", "--variants", RECURRENT, "--threads", "1"]
    command = [sys.executable, "-m", "training", "study", *small, "--data", str(data), "--out", str(tmp_path / "out")]
    log = tmp_path / "out" / "cells" / f"{RECURRENT}_40_0" / "log.jsonl"
    with subprocess.Popen([*command, "--budgets", "40"], stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and '"step": 3,' in log.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    stopped = json.loads(log.read_text().splitlines()[-1])
    assert (stopped["event"], stopped["finished"]) == ("stop", False)
    resumable = subprocess.run([*command, "--budgets", "40", "--list"], capture_output=True, text=True, check=True)
    assert f"{RECURRENT}_40_0" in resumable.stdout


def test_a_run_that_ends_while_others_stop_keeps_its_result(tmp_path: Path) -> None:
    """It has trained to its end and is being measured: its folder is gone when its result comes."""
    plan = chosen(PLANS["tiny"](), [BASELINE], [0.01, 0.02, 0.04])
    stopped, measuring, waiting = Future[Any](), Future[Any](), Future[Any]()
    futures = iter((stopped, measuring, waiting))
    stopped.set_result(None)

    class Pool:
        def submit(self, *call: object) -> Future[Any]:
            return next(futures)

        def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
            assert wait and cancel_futures
            measuring.set_result(result(BASELINE, 0.02, 1.5))
            waiting.cancel()

    runner = Runner(plan, Surroundings(tmp_path, Any, Any, "cpu", 1, False), 2)  # type: ignore[arg-type]
    runner._train(Pool(), plan.cells())  # type: ignore[arg-type]
    assert [one["cell"] for one in read_results(tmp_path)] == [f"{BASELINE}_0.02_0"]
    assert [cell.tokens_per_parameter for cell in runner.missing()] == [0.01, 0.04]


def test_errors_are_clear(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--report-only"], "holds no result yet"),
        (["--budgets", "-1"], "budgets must be above 0"),
        (["--device", "cuda"], "no CUDA device can be used here"),
        (["--device", "abacus"], "no such kind of device"),
    ):
        assert study(data, tmp_path / "none", *more) == 1
        assert message in capsys.readouterr().err


def test_a_study_of_before_goes_on_with_its_rows(tmp_path: Path) -> None:
    """What was stored before runs had these settings."""
    plan = PLANS["tiny"]()
    assert claim(tmp_path, plan, "data") == plan
    stored = json.loads((tmp_path / "study.json").read_text())
    del stored["base"]["fill_eval_rows"], stored["base"]["guard"]["skip_factor"]
    (tmp_path / "study.json").write_text(json.dumps(stored))
    for _ in range(2):
        assert not claim(tmp_path, plan, "data").base.fill_eval_rows
    one_by_one = replace(plan, base=replace(plan.base, cuda_graphs=False))
    assert not claim(tmp_path, one_by_one, "data").base.cuda_graphs, "which changes no result"
    for other in (replace(plan, base=replace(plan.base, batch_size=7)), PLANS["million"]()):
        with pytest.raises(StudyError, match="holds a study with other settings"):
            claim(tmp_path, other, "data")


def test_a_torn_last_line_counts_as_not_there(tmp_path: Path) -> None:
    path = tmp_path / RESULTS_FILE
    path.write_text(json.dumps({"cell": "a"}) + '\n{"cell": "b')
    assert read_results(tmp_path) == [{"cell": "a"}]
    claim(tmp_path, PLANS["tiny"](), "data")
    assert path.read_text() == json.dumps({"cell": "a"}) + "\n"
    path.write_text('{"cell": "b\n' + json.dumps({"cell": "a"}) + "\n")
    with pytest.raises(StudyError, match="line 1 is no result"):
        read_results(tmp_path)
