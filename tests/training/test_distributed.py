"""Two ranks over gloo train as one process does, replicated and sharded, and take up each other's runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lrt_core.checkpoint import load_model
from tests.training.helpers import tiny_corpus, tiny_trainer
from tests.training.two_ranks import CASES, SAVED_STEP, begin, losses
from training.distributed import Ranks
from training.trainer import Trainer, TrainingError

TOLERANCE = 1e-5


def launch(arguments: list[str], size: int = 2) -> list[subprocess.Popen[str]]:
    """Start `python arguments` as ranks of one another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of every rank."""
    return [(process.returncode, *output) for process in processes for output in [process.communicate(timeout=120)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every case: by one process, and by two ranks that ran on their own and from the first one's states."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = {}
    for case in CASES:
        trainer = begin(folder / case, case)
        alone[case] = losses(trainer)
        alone[f"{case} evaluation"] = trainer.evaluate()
    (folder / "alone.json").write_text(json.dumps(alone))
    for status, _, errors in ended(launch(["-W", "error", "-m", "tests.training.two_ranks", str(folder)])):
        assert status == 0, errors
    return folder


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replicated", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process(folder: Path, case: str, way: str) -> None:
    alone, together = read(folder, "alone.json"), read(folder, "losses.json")
    for one, other in zip(alone[case], together[f"{case} {way}"], strict=True):
        assert other == pytest.approx(one, abs=TOLERANCE)
    assert together[f"{case} {way} evaluation"]["bpb"] == pytest.approx(alone[f"{case} evaluation"]["bpb"], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replicated", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_with_another_number_of_ranks(folder: Path, case: str, way: str) -> None:
    """From one to two, and from two to one."""
    whole = read(folder, "alone.json")[case][SAVED_STEP:]
    resumed = {
        "two": read(folder, "losses.json")[f"{case} {way} resumed"],
        "one": losses(Trainer.resume(folder / f"{case} {way}", tiny_corpus())),
    }
    for number, results in resumed.items():
        for one, other in zip(whole, results, strict=True):
            assert other == pytest.approx(one, abs=TOLERANCE), number


@pytest.mark.slow
def test_a_sharded_run_writes_its_checkpoint(data: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", ["--preset", "tiny", "--data", str(data), "--steps", "2", "--device", "cpu", "--fsdp"]
    command = ["-m", "training", *settings, "--run-folder", str(run)]
    for status, _, errors in ended(launch(command)):
        assert status == 0, errors
    assert load_model(run / "checkpoint").config.num_layers == 2


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"batch_size 2 must be a multiple of 3: 3 rank\(s\)"):
        Trainer(tiny_trainer(tmp_path).config, tmp_path, tiny_corpus(), tiny_trainer(tmp_path).tokenizer, ranks=Ranks(0, 3))
