"""What a run needs to go on exactly where it stopped, in one file that is replaced atomically.

Layout of a run's folder:
    config.json      its TrainingConfig
    command.txt      the command that started it, for the model card
    tokenizer/       the tokenizer's two files
    state.pt         TrainingState, read with weights_only
    log.jsonl        one JSON object per line
    checkpoint/      the finished model, a checkpoint directory
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt_core.files import sync

STATE_FILE = "state.pt"
CONFIG_FILE = "config.json"
COMMAND_FILE = "command.txt"
LOG_FILE = "log.jsonl"
TOKENIZER_FOLDER = "tokenizer"
CHECKPOINT_FOLDER = "checkpoint"


class StateError(ValueError):
    """A run that cannot be resumed; the message names the file."""


@dataclass
class TrainingState:
    """step: optimizer steps done; elapsed: seconds of training so far; position: next token of the data (`packing.Position`).

    data_fingerprint tells whether the corpus is still the one that `position` points into. guard: `Guard.state_dict`.
    """

    step: int
    elapsed: float
    position: dict[str, Any]
    data_fingerprint: str
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: Tensor
    guard: dict[str, Any]


def save_state(run: Path, state: TrainingState) -> None:
    """Write the state through to the disk beside the old one, then replace that; a crash leaves one of the two whole."""
    temporary = run / f"{STATE_FILE}.tmp"
    torch.save({one.name: getattr(state, one.name) for one in fields(state)}, temporary)
    sync(temporary)
    os.replace(temporary, run / STATE_FILE)
    sync(run)


def load_state(run: Path) -> TrainingState:
    """The last saved state; StateError when there is none or it is damaged."""
    path = run / STATE_FILE
    if not path.is_file():
        raise StateError(f"{path}: no saved state to resume from")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise StateError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict) or set(data) != {one.name for one in fields(TrainingState)}:
        raise StateError(f"{path}: not a training state of this version")
    return TrainingState(**data)
