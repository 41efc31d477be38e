"""`lrt-train` killed at random moments and resumed until it is done loses nothing and repeats itself to the last bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from training.__main__ import main
from training.state import has_states

STEPS, NUM_KILLS = 32, 3


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def settings(data: Path, run: Path) -> list[str]:
    every = ["--save-every", "3", "--log-every", "1", "--eval-every", "7"]
    return ["--preset", "tiny", "--data", str(data), "--run", str(run), "--steps", str(STEPS), "--precision", "float32", *every]


def steps(run: Path) -> dict[int, list[tuple[Any, ...]]]:
    """What the log says of every step, once for each time that the step was made."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "step":
            found.setdefault(entry["step"], []).append((entry["loss"], entry["bpb"], entry["grad_norm"]))
    return found


def num_made(run: Path) -> int:
    """Steps that were made, those that were made again included."""
    return sum(map(len, steps(run).values())) if (run / "log.jsonl").exists() else 0


@pytest.mark.slow
def test_killed_at_any_moment(data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(settings(data, whole)) == 0
    moments, num_kills, status = random.Random(0), 0, -1
    while status != 0:
        process = start(*(["--resume", str(killed)] if has_states(killed) else settings(data, killed)))
        target = num_made(killed) + 5
        while process.poll() is None and num_kills < NUM_KILLS:
            time.sleep(0.01)
            if num_made(killed) >= target:
                # Three steps and their save take some tenths of a second: the kill falls anywhere within them.
                delay = moments.uniform(0.0, 0.3)
                try:
                    process.wait(delay)
                except subprocess.TimeoutExpired:
                    process.kill()
                    num_kills += 1
                break
        errors, status = process.communicate()[1], process.returncode
        assert status in (0, -9), errors
    assert num_kills == NUM_KILLS
    expected, found = steps(whole), steps(killed)
    assert list(expected) == sorted(found) == list(range(1, STEPS + 1))
    for step, results in found.items():
        assert set(results) == set(expected[step]), step
    assert all(len(results) <= num_kills + 1 for results in found.values())
    weights = [(run / "checkpoint" / "model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]
