"""`lrt-eval` end to end on tiny checkpoints: figures, JSON, plots, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lrt_core.checkpoint import save_checkpoint
from tests.helpers import VARIANTS, contracting_model, tiny_config, tiny_model, tiny_tokenizer
from training.config import TrainingConfig
from training.data import load_corpus
from training.evaluation import main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the import of the other thing in a deep path\n\n" * 60)
    return path


def evaluated(directory: Path, data: Path, *arguments: str) -> dict[str, Any]:
    target = directory.parent / "results.json"
    small = ["--rows", "3", "--task-rows", "4", "--task-len", "12", "--json", str(target)]
    assert main([str(directory), "--data", str(data), *small, *arguments]) == 0
    results: dict[str, Any] = json.loads(target.read_text())
    return results


def test_a_recurrent_checkpoint(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "model", contracting_model(), tiny_tokenizer())
    results = evaluated(tmp_path / "model", data, "--plots", str(tmp_path / "plots"))
    assert results["tokens"] == 3 * 64
    assert results["sequential_method"] == "refinement"
    assert results["check"]["rows"] == 1
    assert results["check"]["difference"] == pytest.approx(0, abs=1e-4)
    assert len(results["parallel_bpb"]) == 3
    assert results["sequential_bpb"] == pytest.approx(results["merged_bpb"], rel=0.05)
    assert 0 < results["contraction"] < 0.9
    assert results["residuals"][0] == pytest.approx(1)
    assert set(results["tasks"]) == {"copying", "induction", "recall"}
    assert {"early", "late", "late_minus_early"} == set(results["in_context"])
    assert [path.name for path in sorted((tmp_path / "plots").iterdir())] == ["gates.png", "passes.png", "positions.png"]
    printed = capsys.readouterr().out
    assert f"sequential bpb      {results['sequential_bpb']:.4f}  (as served; by refinement)" in printed
    assert "residual by pass    1.0e+00  " in printed
    assert "layer 2 " in printed


def test_a_plain_checkpoint(data: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", tiny_model(tiny_config(**VARIANTS["plain"])), tiny_tokenizer())
    results = evaluated(tmp_path / "model", data)
    assert results["schedule"] == "baseline"
    assert results["contraction"] is None
    assert results["sequential_bpb"] == pytest.approx(results["parallel_bpb"][0], rel=1e-4)


def test_another_schedule(data: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", contracting_model(), tiny_tokenizer())
    results = evaluated(tmp_path / "model", data, "--schedule", "multi_refine", "--num-refinements", "4")
    assert len(results["parallel_bpb"]) == 5
    assert results["merged_bpb"] == results["parallel_bpb"][-1]


def test_without_data_it_reads_what_training_holds_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python files of this machine that no run on them trains on."""
    files = {f"{index}.py": tmp_path / f"{index}.py" for index in range(300)}
    for index, path in enumerate(files.values()):
        path.write_text(f"import {'abcdefghij'[index // 30]}_{'klmnopqrstuvwxyzABCDEFGHIJKLMN'[index % 30]}\n" * 200)
    monkeypatch.setattr("training.data.documents.python_files", lambda with_packages: files)
    held_out = load_corpus(["python-sources"], TrainingConfig.validation_fraction, 1 << 20).validation
    assert 1 < len(held_out) < 20
    given = [argument for document in held_out for argument in ("--data", str(tmp_path / document.name.partition("#")[0]))]
    small = ["--rows", "3", "--task-rows", "2", "--task-len", "8", "--sequence-len", "16", "--json"]
    assert main([str(checkpoint), *small, str(tmp_path / "own.json")]) == 0
    assert main([str(checkpoint), *given, *small, str(tmp_path / "given.json")]) == 0
    own, all_given = (json.loads((tmp_path / name).read_text()) for name in ("own.json", "given.json"))
    assert (own.pop("data"), all_given.pop("data")) == ("held out", "all")
    assert own == all_given


def test_of_data_it_reads_what_training_holds_out_if_asked(checkpoint: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(200):
        (texts / f"{index}.txt").write_text(f"number {index} of the things\n" * 9)
    held_out = load_corpus([str(texts)], TrainingConfig.validation_fraction, 1 << 20).validation
    assert 0 < len(held_out) < 20
    apart = tmp_path / "apart"
    apart.mkdir()
    for document in held_out:
        (apart / Path(document.name).name.partition("#")[0]).write_text(document.text)
    short = ("--sequence-len", "16")
    own = evaluated(checkpoint, texts, "--held-out", *short)
    assert own["data"] == "held out" and own["bytes"] != evaluated(checkpoint, texts, *short)["bytes"]
    assert own["rows"] == evaluated(checkpoint, apart, *short)["rows"]


def test_what_does_not_settle_is_decoded(data: Path, checkpoint: Path) -> None:
    slow = evaluated(checkpoint, data, "--max-passes", "2", "--sequence-len", "20")
    exact = evaluated(checkpoint, data, "--max-passes", "20", "--sequence-len", "20")
    assert slow["sequential_method"] == "token by token"
    assert exact["sequential_method"] == "refinement"
    assert slow["sequential_bpb"] == pytest.approx(exact["sequential_bpb"], rel=1e-4)
    assert [one["loss"] for one in slow["positions"]] == pytest.approx([one["loss"] for one in exact["positions"]], rel=1e-4)
    assert slow["in_context"] == pytest.approx(exact["in_context"], abs=1e-4)
    assert slow["tasks"] == exact["tasks"] and slow["layers"] == exact["layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--sequence-len", "100000"], "no full row of 100000 tokens"),
        (["--schedule", "baseline"], "the baseline schedule trains models without recurrence"),
        (["--chunk-len", "4"], "--chunk-len is an option of chunked, not of interleaved"),
        (["--tolerance", "0"], "--tolerance must lie between 0 and 1"),
        (["--json", "nowhere/results.json"], "--json nowhere/results.json: there is no folder"),
        (["--task-len", "3"], "--task-len must be at least 4"),
        (["--device", "abacus"], "--device abacus: no such kind of device"),
    ],
)
def test_errors(arguments: list[str], message: str, data: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), "--data", str(data), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_checkpoint(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--data", str(data)]) == 1
    assert "nothing" in capsys.readouterr().err
