"""The log, and the sinks beside it: what they get, what a failing one does, and TensorBoard's files read by its own reader."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.training.helpers import tiny_corpus, tiny_trainer
from tests.training.test_trainer import read_log
from training.progress import Progress
from training.sinks import TensorBoard, Wandb, require
from training.trainer import Trainer


class Recorder:
    """A sink that keeps what it gets, and fails where it is told to."""

    name = "recorder"

    def __init__(self, fails_in: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails_in = fails_in

    def _take(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fails_in:
            raise RuntimeError("no space")

    def open(self, step: int) -> None:
        self._take("open", step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._take("scalars", step, dict(values))

    def close(self) -> None:
        self._take("close")


def test_sinks_get_the_numbers_of_steps_and_evaluations(tmp_path: Path) -> None:
    sink = Recorder()
    with Progress(tmp_path / "log.jsonl", [sink], step=3) as progress:
        progress.log("start", step=3)
        progress.log("step", step=4, loss=2.5, skipped=1, note="x", flag=True)
        progress.log("evaluation", step=4, bpb=1.5, bpb_per_pass=[1.0, 2.0])
    steps = [("scalars", 4, {"train/loss": 2.5, "train/skipped": 1}), ("scalars", 4, {"validation/bpb": 1.5})]
    assert sink.calls == [("open", 3), *steps, ("close",)]


def test_the_log_is_json_even_where_a_number_is_none(tmp_path: Path) -> None:
    with Progress(tmp_path / "log.jsonl") as progress:
        progress.log("skipped", loss=math.nan, grad_norm=math.inf, step=1)
    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line) == {"event": "skipped", "loss": None, "grad_norm": None, "step": 1}


@pytest.mark.parametrize("whole", ["", '{"event": "start"}\n', '{"event": "start"}\n{"event": "step"}\n'])
@pytest.mark.parametrize("torn", ["", '{"event": "st', "x" * 200_000])
def test_a_torn_last_line_is_removed(tmp_path: Path, whole: str, torn: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(whole + torn)
    with Progress(path) as progress:
        progress.log("start", step=3)
    assert path.read_text() == whole + '{"event": "start", "step": 3}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_that_names_the_log(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"^{tmp_path}/log\.jsonl: cannot be written: No space left on device$"):
        trainer.run()


@pytest.mark.parametrize(("where", "calls"), [("open", 1), ("scalars", 2), ("close", 10)])
def test_a_failing_sink_is_named_once_and_the_run_goes_on(
    tmp_path: Path, where: str, calls: int, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, other = Recorder(where), Recorder()
    assert tiny_trainer(tmp_path).run([failing, other])
    assert len(failing.calls) == calls
    assert [call[0] for call in other.calls] == ["open", *["scalars"] * 8, "close"]
    assert capsys.readouterr().err.count("recorder failed and is off from here on: RuntimeError: no space") == 1
    assert read_log(tmp_path, "sink_failed") == [
        {"event": "sink_failed", "sink": "recorder", "error": "RuntimeError: no space"}
    ]
    assert read_log(tmp_path, "stop")[0]["finished"] is True


def test_tensorboard_reads_what_a_run_wrote(tmp_path: Path) -> None:
    """Every figure of every step, once; those made again after a kill replace the earlier ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = tiny_trainer(tmp_path)
    with Progress(tmp_path / "log.jsonl", [TensorBoard(tmp_path)]) as progress:
        killed.save()
        for step in (1, 2, 3):
            progress.log("step", step=step, loss=100.0)
    assert Trainer.resume(tmp_path, tiny_corpus()).run([TensorBoard(tmp_path)])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = ("loss", "bpb", "grad_norm", "lr_scale", "skipped", "tokens_per_second", "tokens", "elapsed")
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in names} | {"validation/bpb"}
    logged = {line["step"]: line["loss"] for line in read_log(tmp_path, "step") if line["loss"] != 100.0}
    assert {one.step: one.value for one in events.Scalars("train/loss")} == pytest.approx(logged, rel=1e-6)
    assert len(events.Scalars("train/loss")) == 6
    validated = {line["step"]: line["bpb"] for line in read_log(tmp_path, "evaluation")}
    assert {one.step: one.value for one in events.Scalars("validation/bpb")} == pytest.approx(validated, rel=1e-6)


class FakeRun:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.rows, self.metrics, self.finished = settings, list[dict[str, float]](), list[Any](), 0

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeRun]]:
    """The runs that a stand-in for the package began; the real one is a hundred megabytes."""
    begun: list[FakeRun] = []
    fake: Any = ModuleType("wandb")
    fake.__spec__ = SimpleNamespace(name="wandb")
    fake.Settings = lambda **settings: settings

    def init(**settings: Any) -> FakeRun:
        begun.append(FakeRun(settings))
        return begun[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    yield begun


def test_wandb_goes_on_with_its_run(tmp_path: Path, runs: list[FakeRun]) -> None:
    trainer = tiny_trainer(tmp_path)
    assert trainer.run([Wandb(tmp_path, "trials", trainer.config.to_dict())])
    resumed = Trainer.resume(tmp_path, tiny_corpus())
    assert resumed.run([Wandb(tmp_path, "trials", resumed.config.to_dict())])
    first, second = runs
    assert first.settings == second.settings
    assert {"project": "trials", "resume": "allow", "dir": str(tmp_path)}.items() <= first.settings.items()
    assert len(first.settings["id"]) == 16
    assert first.settings["config"]["num_steps"] == 6
    assert first.metrics == [("step", None), ("*", "step")]
    assert [row["step"] for row in first.rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {"train/loss", "train/bpb", "train/grad_norm", "train/lr_scale", "train/tokens_per_second", "train/skipped"} <= set(
        first.rows[0]
    )
    assert first.finished == second.finished == 1


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"--{package} needs {package}: pip install 'lrt-server\[logging\]'"):
        require(f"--{package}", package)
