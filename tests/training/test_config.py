"""TrainingConfig: what is refused, presets, JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.training.helpers import tiny_run
from training.config import PRESETS, OptimizerConfig, TrainingConfig, TrainingConfigError
from training.schedules.baseline import baseline
from training.schedules.interleaved import interleaved


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_json_round_trip(name: str) -> None:
    config = PRESETS[name]
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "batch_size must be an integer of at least 1"),
        ("num_steps", 1.5, "num_steps must be an integer"),
        ("save_every", True, "save_every must be an integer"),
        ("schedule", "chunky", "schedule must be one of"),
        ("precision", "float16", "precision must be one of"),
        ("warmdown", 1.2, "warmdown is a fraction"),
        ("prompt_cuts", -0.1, "prompt_cuts is a fraction"),
        ("validation_fraction", 0, "validation_fraction must lie in"),
        ("time_budget", 0.0, "time_budget must be above 0"),
        ("data", (), "data must name"),
        ("schedule", "baseline", "needs a model without recurrence"),
        (
            "num_refinements",
            2,
            "num_refinements is no option of the schedule interleaved .its options: num_subsets, kv_refresh",
        ),
        ("num_subsets", "two", "num_subsets must be of type int, got 'two'"),
        ("compile", 1, "compile must be true or false"),
        ("chat", True, "prompt_cuts must be 0 for conversations, got 0.05"),
    ],
)
def test_bad_values_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(TrainingConfigError, match=message):
        tiny_run(**{field: value})


def test_interleaved_needs_recurrence() -> None:
    with pytest.raises(TrainingConfigError, match="interleaved needs a model with recurrence"):
        tiny_run(model={"recurrence": None}, schedule="interleaved")


@pytest.mark.parametrize(("field", "value"), [("matrix_lr", -1.0), ("clip_norm", 0.0), ("head_lr", "fast"), ("lr_scale", 0.0)])
def test_bad_optimizer_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(TrainingConfigError, match=f"optimizer.{field}"):
        replace(OptimizerConfig(), **{field: value})


def test_learning_rates_scale_together() -> None:
    rates = OptimizerConfig(weight_decay=0.5).scaled(0.1)
    assert (rates.matrix_lr, rates.scale_lr) == pytest.approx((0.003, 0.01))
    assert (rates.weight_decay, rates.clip_norm) == (0.5, 1.0)
    with pytest.raises(TrainingConfigError, match="scaled by more than 0, got 0"):
        rates.scaled(0)


@pytest.mark.parametrize("owner", ["run", "optimizer", "guard"])
def test_unknown_and_missing_keys_are_named(owner: str) -> None:
    data = tiny_run().to_dict()
    part = data if owner == "run" else data[owner]
    part["speed"] = 3
    with pytest.raises(TrainingConfigError, match=rf"unknown {owner} setting\(s\): speed"):
        TrainingConfig.from_dict(data)
    del part["speed"]
    removed = {"run": "seed", "optimizer": "head_lr", "guard": "max_skipped"}[owner]
    del part[removed]
    with pytest.raises(TrainingConfigError, match=rf"missing {owner} setting\(s\): {removed}"):
        TrainingConfig.from_dict(data)


def test_a_stored_run_keeps_its_evaluation_rows() -> None:
    data = tiny_run().to_dict()
    del data["fill_eval_rows"]
    assert TrainingConfig.from_dict(data) == replace(tiny_run(), fill_eval_rows=False)


def test_schedules_are_bound_with_their_options() -> None:
    assert tiny_run(model={"recurrence": None}).make_schedule() is baseline
    schedule = tiny_run(num_subsets=3, kv_refresh=True).make_schedule()
    assert isinstance(schedule, partial)
    assert (schedule.func, schedule.keywords) == (interleaved, {"num_subsets": 3, "kv_refresh": True})
