"""What a run's folder holds before the first state: its configuration, its tokenizer, the command that began it.

Neighbours: `state.py` says what else lies there, `trainer.py` and `__main__.py` use it.
"""

from __future__ import annotations

from pathlib import Path

from lrt_core.files import read_json, write_json, write_text
from lrt_core.tokenizer import Tokenizer
from training.config import TrainingConfig
from training.state import COMMAND_FILE, CONFIG_FILE, TOKENIZER_FOLDER, StateError, has_states


def write_settings(config: TrainingConfig, run: Path, tokenizer: Tokenizer, command: str) -> None:
    """Begin a run's folder: all that it holds before the first state. StateError when a run lies there already."""
    check_is_new(run)
    (run / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
    tokenizer.save(run / TOKENIZER_FOLDER)
    write_json(run / CONFIG_FILE, config.to_dict())
    write_text(run / COMMAND_FILE, command + "\n")


def check_is_new(run: Path) -> None:
    """StateError when a saved run lies in the folder."""
    if has_states(run):
        raise StateError(f"{run}: holds a run already; resume it or choose another folder")


def load_run_config(run: Path) -> TrainingConfig:
    """The configuration stored in a run's folder."""
    return TrainingConfig.from_dict(read_json(run / CONFIG_FILE))


def load_run_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer stored in a run's folder."""
    return Tokenizer.from_directory(run / TOKENIZER_FOLDER)
