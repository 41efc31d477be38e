"""Where a run's figures go beside its own log: TensorBoard, Weights & Biases. Both are optional packages (extra `logging`).

A sink is an object with `open`, `scalars` and `close`; `progress.py` calls it, and switches it off when it fails.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb-id.txt"


class Sink(Protocol):
    """What takes the figures of a run. Any method may raise: the run goes on without the sink."""

    name: str

    def open(self, step: int) -> None:
        """Begin, or go on after `step` steps."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take values by their name (`train/loss`) as of `step`."""
        ...

    def close(self) -> None:
        """Write what is not written yet. Called once after `open`, whether that worked or not."""
        ...


def require(flag: str, package: str) -> None:
    """ValueError that names the extra unless the package is installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag} needs {package}: pip install 'lrt-server[logging]'")


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder. ValueError where TensorBoard is not installed."""

    name = "tensorboard"

    def __init__(self, run: Path) -> None:
        require("--tensorboard", "tensorboard")
        self.folder = run / TENSORBOARD_FOLDER
        self._writer: Any = None

    def open(self, step: int) -> None:
        """What a killed run wrote after `step` is hidden: those steps are made again."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run of a project in Weights & Biases, which goes on when the training run is resumed.

    Its own variables hold, WANDB_MODE=offline among them; its files lie in `wandb/` of the run's folder. ValueError where the
    package is not installed.
    """

    name = "wandb"

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]) -> None:
        require("--wandb", "wandb")
        if not project:
            raise ValueError("--wandb must name a project")
        self.folder, self.project, self.config = run, project, dict(config)
        self._run: Any = None

    def open(self, step: int) -> None:
        """Begin a run under a new id, or go on with the one whose id the folder holds."""
        import wandb

        path = self.folder / WANDB_ID_FILE
        if not path.exists():
            path.write_text(secrets.token_hex(8) + "\n", "utf-8")
        self._run = wandb.init(
            project=self.project,
            name=self.folder.name,
            id=path.read_text("utf-8").strip(),
            resume="allow",
            dir=str(self.folder),
            config=self.config,
            settings=wandb.Settings(console="off"),
        )
        # Its own counter may only rise; after a kill, steps come again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row, with its step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Finish the run there, so that everything is sent or written."""
        if self._run is not None:
            self._run.finish()
