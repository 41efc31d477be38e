"""Folders have one worker at a time, whose lock goes with it; helpers end with the process that started them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.helpers import tiny_trainer
from training.__main__ import main
from training.processes import BusyError, exclusively

HOLDER = """
import sys, time
from pathlib import Path
from training.processes import exclusively

with exclusively(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from training.study import worker
from training.study.cells import Surroundings

around = Surroundings(Path("."), None, None, "cpu", 1, False)
with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=worker.begin, initargs=(around,)) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 60)
    time.sleep(60)
"""


def started(source: str, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A Python process and the first line that it prints."""
    command = [sys.executable, "-c", source, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process, line = started(HOLDER, str(folder))
    with process:
        assert line == "held"
        with pytest.raises(BusyError, match=f"{folder}: another process is training here"), exclusively(folder):
            pass
        process.kill()
        process.wait()
        with exclusively(folder):
            (folder / "state").write_text("x")
        with exclusively(folder):
            (folder / "state").unlink()
        assert not folder.exists(), "nothing is left where nothing was done"


def test_commands_refuse_a_folder_in_use(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    tiny_trainer(run).save()
    before = sorted(run.rglob("*"))
    new = ["--preset", "tiny", "--data", str(data), "--run", str(run)]
    study = ["study", "--plan", "tiny", "--data", str(data), "--out", str(run)]
    with exclusively(run):
        for arguments in (new, ["--resume", str(run)], ["--resume", str(run), "--finish"], study):
            assert main(arguments) == 1
            assert f"error: {run}: another process is training here\n" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == sorted([*before, run / ".lock"])


def ends(pid: int) -> bool:
    """Whether a process, none of our children, ends within a few seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True  # it ended, and nobody has taken notice yet
        time.sleep(0.02)
    return False


@pytest.mark.slow
def test_a_study_s_workers_end_with_it(tmp_path: Path) -> None:
    process, line = started(PARENT)
    with process:
        process.kill()
    assert ends(int(line))
