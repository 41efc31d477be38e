"""What a run needs to go on exactly where it stopped: saved states, each a folder that appears whole or not at all.

Layout of a run's folder:
    config.json      its TrainingConfig
    shards.json      which sets of tokenised data are its own; they lie in shards/, or where --shards says
    command.txt      the command that started it, for the model card
    tokenizer/       the tokenizer's two files
    states/          one folder per saved step: state.json, which also knows the other files' checksums, and tensors
    log.jsonl        one JSON object per line
    checkpoint/      the finished model, a checkpoint directory

A state is written under a temporary name, forced to the disk and renamed; only then are older ones removed. One that fails
its checksums is passed over for the one before. Neighbours: `sharded.py` writes and reads the tensors.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lrt_core.files import CheckpointError, read_json, sync, write_json
from training.distributed import ALONE, RankError, Ranks, ShardError

STATES_FOLDER = "states"
STATE_FILE = "state.json"
CONFIG_FILE = "config.json"
COMMAND_FILE = "command.txt"
LOG_FILE = "log.jsonl"
TOKENIZER_FOLDER = "tokenizer"
CHECKPOINT_FOLDER = "checkpoint"

VERSION = 1
Which = Literal["last", "best"]


class StateError(ValueError):
    """A run that cannot be saved or resumed; the message names the file."""


@dataclass
class TrainingState:
    """A state beside its tensors, plain data.

    step: optimizer steps done; elapsed: seconds of training so far; position: next token of the data (`packing.Position`).
    data_fingerprint tells whether the corpus is still the one that `position` points into. guard: `Guard.state_dict`. bpb: of
    the validation rows, None where they were not evaluated at this step.
    """

    step: int
    elapsed: float
    position: dict[str, Any]
    data_fingerprint: str
    guard: dict[str, Any]
    bpb: float | None = None


class Loaded(NamedTuple):
    """A state, and of each that could not be read and was passed over, why."""

    state: TrainingState
    damaged: list[str]


def save_state(
    run: Path,
    state: TrainingState,
    tensors: dict[str, Tensor],
    ranks: Ranks = ALONE,
    keep_last: int = 2,
    keep_best: bool = False,
) -> None:
    """Write a state, then remove what is neither among the last nor, if that is wanted, the best. All ranks call it.

    StateError, with the older states whole and nothing left of this one, when it cannot be written.
    """
    from training.sharded import write_tensors

    folder = run / STATES_FOLDER
    name = _name(state.step)
    temporary = folder / f".{name}.tmp"
    try:
        ranks.on_first(lambda: _make_room(folder, temporary))
        write_tensors(temporary, tensors, ranks)
        files = _checksums(temporary, ranks)
        ranks.on_first(lambda: _publish(temporary, folder / name, state, files))
    except RankError:
        raise
    except (ShardError, OSError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise StateError(f"{folder / name}: cannot be saved: {reason}; the states before it are whole") from None
    ranks.on_first(lambda: _remove_old(folder, keep_last, keep_best))


def load_state(run: Path, tensors: dict[str, Tensor], ranks: Ranks = ALONE, which: Which = "last") -> Loaded:
    """Fill `tensors` in place from the newest state, or the one with the lowest bpb; all ranks call it.

    A damaged state is passed over for the next; StateError when there is none, or none that can be read.
    """
    folder = run / STATES_FOLDER
    candidates = ranks.first(_candidates(folder, which) if ranks.is_first else [])
    if not candidates:
        raise StateError(f"{folder}: no saved state to {'resume from' if which == 'last' else 'take: none was evaluated'}")
    damaged: list[str] = []
    for path in candidates:
        try:
            return Loaded(_read(path, tensors, ranks), damaged)
        except (ShardError, CheckpointError, OSError) as error:
            damaged.append(f"{path}: {error}")
    raise StateError(f"no saved state can be read: {'; '.join(damaged)}")


def has_states(run: Path) -> bool:
    """Whether a state was saved in the run's folder."""
    return bool(_steps(run / STATES_FOLDER))


def best_bpb(run: Path) -> float:
    """The lowest of the saved states, infinity where none was evaluated."""
    return min(map(_bpb, _steps(run / STATES_FOLDER)), default=math.inf)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _steps(folder: Path) -> list[Path]:
    """The complete states, oldest first."""
    return sorted(folder.glob("step-*"), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _bpb(path: Path) -> float:
    """A state's figure, infinity where it has none or is damaged."""
    try:
        value = read_json(path / STATE_FILE).get("bpb")
    except CheckpointError:
        return math.inf
    return value if isinstance(value, float) else math.inf


def _candidates(folder: Path, which: Which) -> list[Path]:
    """States in the order in which they are to be tried."""
    newest = _steps(folder)[::-1]
    return newest if which == "last" else sorted((path for path in newest if _bpb(path) < math.inf), key=_bpb)


def _make_room(folder: Path, temporary: Path) -> None:
    """An empty temporary folder; what crashed writers left goes first."""
    if not folder.exists():
        folder.mkdir(parents=True)
        sync(folder.parent)
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left)
    temporary.mkdir()


def _publish(temporary: Path, path: Path, state: TrainingState, files: dict[str, list[int]]) -> None:
    plain = {one.name: getattr(state, one.name) for one in fields(state)}
    write_json(temporary / STATE_FILE, {"version": VERSION, **plain, "files": files})
    sync(temporary)
    for other in _steps(path.parent):
        if _step(other) >= state.step:
            _set_aside(other)
    temporary.rename(path)
    sync(path.parent)


def _set_aside(path: Path) -> None:
    """Rename a state that lies ahead of the run: it was damaged, so the run went on from one before it."""
    place = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(place, ignore_errors=True)
    path.rename(place)


def _remove_old(folder: Path, keep_last: int, keep_best: bool) -> None:
    steps = _steps(folder)
    kept = set(steps[-keep_last:])
    if keep_best:
        kept |= set(_candidates(folder, "best")[:1])
    for path in steps:
        if path not in kept:
            # Renamed first, so that a half removed state never looks like one.
            shutil.rmtree(path.rename(folder / f".{path.name}.tmp"))


def _read(path: Path, tensors: dict[str, Tensor], ranks: Ranks) -> TrainingState:
    data, error = ranks.first(_attempt(lambda: _plain(path)) if ranks.is_first else (None, None))
    if data is None:
        raise ShardError(error)
    state: TrainingState = data[0]
    files: dict[str, list[int]] = data[1]
    found = _checksums(path, ranks)
    wrong = sorted(name for name, value in files.items() if found.get(name) != value)
    if wrong:
        raise ShardError(f"{wrong[0]} is {'damaged' if wrong[0] in found else 'missing'}")
    from training.sharded import read_tensors

    read_tensors(path, tensors, ranks)
    return state


def _plain(path: Path) -> tuple[TrainingState, dict[str, list[int]]]:
    """What state.json holds."""
    data = read_json(path / STATE_FILE)
    if data.pop("version", None) != VERSION:
        raise ShardError(f"{STATE_FILE}: not a training state of this version")
    files = data.pop("files", None)
    if not isinstance(files, dict) or set(data) != {one.name for one in fields(TrainingState)}:
        raise ShardError(f"{STATE_FILE}: not a training state")
    return TrainingState(**data), files


def _checksums(folder: Path, ranks: Ranks) -> dict[str, list[int]]:
    """Size and CRC-32 of every file, by name; the ranks share the work and all get the result."""
    names = ranks.first(sorted(file.name for file in folder.iterdir() if file.is_file()))
    own = {name: _checksum(folder / name) for name in names[ranks.rank :: ranks.size]}
    return {name: value for part in ranks.gather(own) for name, value in part.items()}


def _checksum(path: Path) -> list[int]:
    """[-1, 0] for a file that is not there or cannot be read: no file has that."""
    size = crc = 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                size, crc = size + len(block), zlib.crc32(block, crc)
    except OSError:
        return [-1, 0]
    return [size, crc]


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result, or None and what is wrong, as one value that other ranks can be told."""
    try:
        return work(), None
    except (ShardError, CheckpointError) as error:
        return None, str(error)
