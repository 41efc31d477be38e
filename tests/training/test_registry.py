"""Schedules are found by their file; their options become settings and flags."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import pytest

import training.schedules
from training.schedules.baseline import baseline
from training.schedules.flags import add_schedule_flags, given_options
from training.schedules.multi_refine import multi_refine
from training.schedules.registry import bind, entries


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_schedule_flags(parser)
    return parser.parse_args(arguments)


def test_one_file_each() -> None:
    assert list(entries()) == ["baseline", "chunked", "interleaved", "multi_refine"]
    assert {name: list(found.options) for name, found in entries().items()} == {
        "baseline": [],
        "chunked": ["chunk_len"],
        "interleaved": ["num_subsets", "kv_refresh"],
        "multi_refine": ["num_refinements", "loss_weights", "detach"],
    }


def test_a_new_file_is_all_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doubled.py").write_text(
        "from training.schedules.losses import Losses\nfrom training.schedules.registry import schedule\n"
        "from training.schedules.baseline import baseline\n\n"
        "@schedule(recurrent=False, cost=lambda factor: 2.0)\ndef doubled(model, tokens, targets):\n"
        "    losses = baseline(model, tokens, targets)\n    return Losses(2 * losses.total, losses.passes)\n"
    )
    monkeypatch.setattr(training.schedules, "__path__", [*training.schedules.__path__, str(tmp_path)])
    monkeypatch.setattr("training.schedules.registry._FOUND", dict(entries()))
    entries.cache_clear()
    try:
        assert parse("--schedule", "doubled").schedule == "doubled"
        assert not entries()["doubled"].is_fixed, "which it has to say"
    finally:
        monkeypatch.undo()
        entries.cache_clear()
    assert "doubled" not in entries()


def test_options_are_bound() -> None:
    assert bind("baseline", {}) is baseline
    bound = bind("multi_refine", {"loss_weights": [1, 2, 3], "detach": True})
    assert isinstance(bound, partial)
    assert (bound.func, bound.keywords) == (multi_refine, {"loss_weights": (1.0, 2.0, 3.0), "detach": True})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("spiral", {}, "schedule must be one of baseline, chunked, interleaved, multi_refine, got 'spiral'"),
        ("baseline", {"detach": True}, r"detach is no option of the schedule baseline \(its options: none\)"),
        ("multi_refine", {"detach": 1}, "detach must be of type bool, got 1"),
        ("multi_refine", {"num_refinements": True}, "num_refinements must be of type int"),
        ("multi_refine", {"loss_weights": ["a"]}, "loss_weights must be a list of numbers"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bind(name, options)


def test_flags() -> None:
    options = parse("--schedule", "multi_refine", "--num-refinements", "3", "--loss-weights", "0.1,0.2,0.3,0.4", "--detach")
    given = given_options(options, "multi_refine")
    assert given == {"num_refinements": 3, "loss_weights": (0.1, 0.2, 0.3, 0.4), "detach": True}
    assert given_options(parse(), "interleaved") == {}


def test_a_flag_of_another_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="--chunk-len is an option of chunked, not of interleaved"):
        given_options(parse("--chunk-len", "8"), "interleaved")


def test_weights_must_be_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--loss-weights", "a,b")
    assert "must be numbers with commas between" in capsys.readouterr().err
