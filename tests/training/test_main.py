"""`lrt-train` end to end: data to a loadable checkpoint, interruption, resuming, and errors that help."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from lrt_core.checkpoint import load_config, load_model, load_tokenizer
from lrt_core.generate import read
from training.__main__ import main
from training.finish import finish
from training.trainer import StepResult, Trainer, TrainingError


def train(data: Path, *arguments: str) -> int:
    return main(["--preset", "tiny", "--data", str(data), "--steps", "6", "--device", "cpu", *arguments])


def test_tiny_preset_makes_a_loadable_checkpoint(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--run", str(tmp_path / "run")) == 0
    folder = tmp_path / "run" / "checkpoint"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert model.config.vocab_size == tokenizer.vocab_size <= 384
    assert read(model.float(), tokenizer.encode("def ")).logits.isfinite().all()
    assert "sequential bpb" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert "    lrt-train --preset tiny --data data --steps 6\n" in card and "`data`: " in card
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_python_sources(tmp_path: Path) -> None:
    """The corpus that is everywhere, read from the interpreter that runs this test."""
    assert main(["--preset", "tiny", "--steps", "3", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`python-library` is the Python standard library of the machine" in card
    assert "The model writes\nPython" in card


def test_baseline_switches_the_recurrence_off(data: Path, tmp_path: Path) -> None:
    assert train(data, "--run", str(tmp_path / "run"), "--schedule", "baseline", "--out", str(tmp_path / "out")) == 0
    assert load_config(tmp_path / "out").recurrence is None
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_settings_reach_the_run_and_the_card(data: Path, tmp_path: Path) -> None:
    settings = ["--num-subsets", "4", "--kv-refresh", "--seed", "5", "--batch-size", "3", "--time-budget", "3600"]
    assert train(data, "--run", str(tmp_path / "run"), *settings, "--precision", "float32") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    options = {"num_subsets": 4, "kv_refresh": True}
    wanted = {"schedule_options": options, "seed": 5, "batch_size": 3, "time_budget": 3600.0, "num_steps": 6}
    assert wanted.items() <= config.items()
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert "--num-subsets 4 --kv-refresh --steps 6 --time-budget 3600 --batch-size 3 --seed 5" in card


def test_ctrl_c_saves_and_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def interrupted_in_the_second(trainer: Trainer) -> StepResult:
        if trainer.num_steps_done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    handler = signal.getsignal(signal.SIGINT)
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", interrupted_in_the_second)
        assert train(data, "--run", str(run)) == 130
    assert f"stopped at step 2; go on with: lrt-train --resume {run}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (run / "checkpoint").exists()
    assert main(["--resume", str(run)]) == 0
    assert (run / "checkpoint" / "config.json").exists()


def test_finish_writes_the_saved_state_without_training_on(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(data, "--run", str(run)) == 0
    log = (run / "log.jsonl").read_text()
    assert main(["--resume", str(run), "--finish", "--out", str(tmp_path / "again")]) == 0
    assert (run / "log.jsonl").read_text() == log
    first, second = (folder / "model.safetensors" for folder in (run / "checkpoint", tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_finishing_needs_neither_a_device_nor_the_optimizer(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert train(data, "--run", str(run), "--steps", "1") == 0
    finished = []
    monkeypatch.setattr("training.trainer.Optimizer", None)
    monkeypatch.setattr("training.__main__.finish", lambda trainer, out: finished.append(trainer) or finish(trainer, out))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert main(["--resume", str(run), "--finish", "--out", str(tmp_path / "again")]) == 0
    (trainer,) = finished
    assert trainer.device.type == "cpu"
    with pytest.raises(TrainingError, match="cannot train on"):
        trainer.step()
    first, second = (folder / "model.safetensors" for folder in (run / "checkpoint", tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("shards", [[], ["--shards", "shared"]])
def test_a_run_goes_on_from_anywhere_and_without_its_files(
    data: Path, tmp_path: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the very same rows: with shards beside it, or as it was before a run wrote down which are its own."""
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert main(["--preset", "tiny", "--data", "data", *shards, "--run", "run", "--steps", "2", "--warmdown", "0.5"]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["--resume", str(run), "--finish", "--out", "one"]) == 0
    assert main(["--preset", "tiny", "--data", str(tmp_path / "other"), "--run", str(run)]) == 1
    data.rename(tmp_path / "gone")
    capsys.readouterr()
    assert main(["--resume", str(run), "--out", "two"]) == 0
    assert f"{data}: no such file or folder; going on with what was made of it, " in (errors := capsys.readouterr().err)
    assert "the data changed" not in errors
    cards = [(elsewhere / name / "README.md").read_text() for name in ("one", "two")]
    assert cards[0] == cards[1]
    (run / "shards.json").unlink()
    assert main(["--resume", str(run), "--finish", "--out", "three"]) == int(bool(shards))
    assert main(["--preset", "tiny", "--init-from", "one", "--data", str(data), "--run", str(run)]) == 1


def test_resuming_with_other_data_warns(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--run", str(tmp_path / "run")) == 0
    (data / "0.py").write_text("other\n")
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert "the data changed" in capsys.readouterr().err


def test_skipped_records_are_reported(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "records.jsonl").write_text('{"text": "good"}\nbad\n')
    assert train(data, "--run", str(tmp_path / "run")) == 0
    assert "skipped 1 corrupt record(s), the first: " in capsys.readouterr().err


def test_a_resumed_run_may_learn_more_slowly_and_skip_otherwise(data: Path, tmp_path: Path) -> None:
    """The run keeps what it is told, and its card says so."""
    run = tmp_path / "run"
    assert train(data, "--run", str(run), "--steps", "1", "--lr-scale", "0.5", "--skip-window", "50") == 0
    changes = ["--lr-scale", "0.25", "--skip-deviations", "0"]
    assert main(["--resume", str(run), *changes, "--no-cuda-graphs", "--device", "cpu"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["cuda_graphs"] is False
    assert config["optimizer"]["lr_scale"] == 0.25
    assert (config["guard"]["skip_window"], config["guard"]["skip_deviations"]) == (50, 0.0)
    card = (run / "checkpoint" / "README.md").read_text()
    assert "--steps 1 --lr-scale 0.5 --skip-window 50\n    lrt-train --resume RUN --lr-scale 0.25 --skip-deviations 0 " in card


def test_a_run_that_gives_up_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("training.guards.Guard.judge", lambda *_: "loss nan is not finite")
        assert train(data, "--run", str(run), "--max-skipped", "1") == 1
    assert f"lrt-train --resume {run} --lr-scale 0.5; or" in capsys.readouterr().err
    assert main(["--resume", str(run), "--lr-scale", "0.5", "--device", "cpu"]) == 0


@pytest.mark.parametrize("flag", [["--tensorboard"], ["--wandb", "trials"]])
def test_missing_loggers_are_named_before_training(
    flag: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, flag[0].strip("-"), None)
    assert train(data, "--run", str(tmp_path / "run"), *flag) == 1
    assert f"{flag[0]} needs {flag[0].strip('-')}: pip install 'lrt-server[logging]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--steps", "0"], "num_steps must be an integer of at least 1"),
        (["--finish"], "--finish needs --resume RUN"),
        (["--init-from", "nowhere"], "nowhere"),
        (["--chunk-len", "4"], "--chunk-len is an option of chunked, not of interleaved"),
        (["--schedule", "multi_refine", "--loss-weights", "1,2"], "loss_weights must be 3 numbers"),
        (["--resume", "nowhere", "--chunk-len", "4"], "--chunk-len cannot be given"),
        (["--resume", "nowhere"], "config.json: file not found"),
        (["--lr-scale", "0"], "optimizer.lr_scale must be above 0"),
        (["--max-skipped", "100"], "max_skipped must lie below skip_window"),
        (["--resume", "nowhere", "--batch-size", "3"], "--batch-size cannot be given"),
        (["--device", "abacus"], "--device abacus: no such kind of device"),
    ],
)
def test_errors(arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments if "--resume" in arguments else ["--data", str(data), "--run", str(tmp_path / "run"), *arguments]
    assert main(["--preset", "tiny", *given]) == 1
    assert message in capsys.readouterr().err


def test_an_existing_run_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--run", str(tmp_path / "run")) == 0
    assert train(data, "--run", str(tmp_path / "run")) == 1
    assert "holds a run already; resume it or choose another folder" in capsys.readouterr().err
