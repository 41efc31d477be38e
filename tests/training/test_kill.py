"""`lrt-train` killed at random moments and resumed until it is done loses nothing and repeats itself to the last bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training.state import has_states

STEPS = 40


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def settings(data: Path, run: Path) -> list[str]:
    every = ["--save-every", "1", "--log-every", "1", "--eval-every", "7"]
    return ["--preset", "tiny", "--data", str(data), "--run", str(run), "--steps", str(STEPS), "--precision", "float32", *every]


def steps(run: Path) -> dict[int, list[tuple[Any, ...]]]:
    """What the log says of every step, once for each time that the step was made."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "step":
            found.setdefault(entry["step"], []).append((entry["loss"], entry["bpb"], entry["grad_norm"]))
    return found


@pytest.mark.slow
def test_killed_at_any_moment(data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(*settings(data, whole))
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    moments, num_kills, status = random.Random(0), 0, -1
    while status != 0:
        process = start(*(["--resume", str(killed)] if has_states(killed) else settings(data, killed)))
        target = len(steps(killed)) + 9 if (killed / "log.jsonl").exists() else 9
        while process.poll() is None and num_kills < 4:
            if (killed / "log.jsonl").exists() and len(steps(killed)) >= target:
                # A step and its save take some hundredths of a second: the kill falls anywhere within them.
                delay = moments.uniform(0.0, 0.1)
                try:
                    process.wait(delay)
                except subprocess.TimeoutExpired:
                    process.kill()
                    num_kills += 1
                break
        errors, status = process.communicate()[1], process.returncode
        assert status in (0, -9), errors
    assert num_kills == 4
    expected, found = steps(whole), steps(killed)
    assert list(expected) == sorted(found) == list(range(1, STEPS + 1))
    for step, results in found.items():
        assert set(results) == set(expected[step]), step
    assert all(len(results) <= num_kills + 1 for results in found.values())
    weights = [(run / "checkpoint" / "model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]
