"""A process that runs cells: what it keeps between them, and how it is told to stop. Neighbours: `runner.py`, `cells.py`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch

from training.processes import end_with_parent
from training.study.cells import Surroundings, run_cell, step_seconds
from training.study.plan import Cell, Plan
from training.trainer import Trainer


class _Worker:
    """This process: what its cells share, the one that it trains, whether it shall end."""

    around: Surroundings
    trainer: Trainer | None = None
    stopped = False

    def stop(self, number: int, frame: object) -> None:
        self.stopped = True
        if self.trainer is not None:
            self.trainer.stop_requested = True

    def take(self, trainer: Trainer) -> None:
        self.trainer = trainer
        trainer.stop_requested = self.stopped


_worker = _Worker()


def begin(around: Surroundings) -> None:
    """Prepare this process, which ends with its parent.

    SIGTERM ends the cell in hand, its state saved; Ctrl-C is left to the parent, who sends that.
    """
    end_with_parent()
    _worker.around = around
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _worker.stop)
    torch.set_num_threads(around.threads)


def run(plan: Plan, cell: Cell) -> dict[str, Any] | None:
    """The cell's result; None when it was stopped."""
    if _worker.stopped:
        return None
    return run_cell(plan, cell, _worker.around, _worker.take)


def time_steps(plan: Plan) -> dict[str, list[float]]:
    """Seconds of each variant's steps."""
    return step_seconds(plan, _worker.around)


def device_name() -> str:
    """What the steps run on, in words."""
    device, threads = torch.device(_worker.around.device), _worker.around.threads
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'a CPU'}, {threads} thread(s)"
