"""Saved states: exact, whole or absent at every moment, damage that is named and passed over, old ones kept as told."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import training.state
from training.state import STATE_FILE, STATES_FOLDER, StateError, TrainingState, has_states, load_state, save_state

INDEX, SHARD = ".metadata", "__0_0.distcp"


def make(step: int) -> tuple[TrainingState, dict[str, Tensor]]:
    position = {"epoch": 0, "num_dealt": 2, "lanes": [{"document": 1, "offset": 7}]}
    tensors = {
        "model.weight": torch.full((4, 3), step / 3),
        "optimizer.step": torch.tensor(float(step)),
        "rng": torch.get_rng_state(),
    }
    guard = {"num_skipped": 1, "losses": [2.5], "norms": [0.1], "skips": [True, False]}
    return TrainingState(step, 0.1 + step, position, "abc", guard, bpb=None), tensors


def empty() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in make(0)[1].items()}


def save(run: Path, step: int, bpb: float | None = None, **options: Any) -> None:
    state, tensors = make(step)
    state.bpb = bpb
    save_state(run, state, tensors, **options)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / STATES_FOLDER).iterdir())


def step_of(run: Path) -> int:
    """The step that is loaded, with all tensors as they were saved then."""
    tensors = empty()
    step = load_state(run, tensors).state.step
    for name, tensor in make(step)[1].items():
        assert torch.equal(tensor, tensors[name]), name
    return step


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 3, bpb=1.25)
    loaded, damaged = load_state(tmp_path, empty())
    assert loaded == TrainingState(3, 3.1, make(3)[0].position, "abc", make(3)[0].guard, 1.25)
    assert damaged == []
    assert step_of(tmp_path) == 3


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    for step, bpb in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 2.5)):
        save(tmp_path, step, bpb, keep_last=2, keep_best=True)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert load_state(tmp_path, empty(), which="best").state.step == 2
    save(tmp_path, 6, keep_last=1)
    assert names(tmp_path) == ["step-00000006"]
    with pytest.raises(StateError, match="none was evaluated"):
        load_state(tmp_path, empty(), which="best")


class Crashed(BaseException):
    """In place of the process's death."""


def test_a_crash_at_any_moment_leaves_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before the n-th change of the disk, for every n there is; then resume, save, and nothing is left over."""
    save(tmp_path / "whole", 1)
    calls = [(training.state, "sync"), (training.state, "write_json"), (training.state.shutil, "rmtree"), (os, "fsync")]
    calls += [(Path, "rename"), (Path, "mkdir"), (os, "unlink"), (os, "rmdir"), (os, "rename"), (os, "replace")]
    moment, found = 0, []
    while True:
        run = tmp_path / str(moment)
        shutil.copytree(tmp_path / "whole", run)
        left = [moment]
        with monkeypatch.context() as patched:
            for owner, name in calls:
                patched.setattr(owner, name, crashing(getattr(owner, name), left))
            try:
                save(run, 2, keep_last=1)
            except Crashed:
                crashed = True
            else:
                crashed = False
        found.append(step_of(run))
        save(run, 3, keep_last=1)
        assert names(run) == ["step-00000003"]
        moment += 1
        if not crashed:
            break
    assert moment > 8
    assert found == sorted(found)
    assert set(found) == {1, 2}


def crashing(function: Any, left: list[int]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        if left[0] == 0:
            raise Crashed
        left[0] -= 1
        return function(*arguments, **options)

    return call


def test_the_old_state_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)

    def write_data(writer: FileSystemWriter, *arguments: object) -> None:
        (writer.path / SHARD).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(FileSystemWriter, "write_data", write_data)
        message = r"step-00000004: cannot be saved: No space left on device; the states before it are whole$"
        with pytest.raises(StateError, match=message):
            save(tmp_path, 4)
    assert names(tmp_path) == ["step-00000003"]
    assert step_of(tmp_path) == 3
    save(tmp_path, 4)
    assert step_of(tmp_path) == 4


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def stale(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (SHARD, cut, f"{SHARD} is damaged"),
        (SHARD, flip, f"{SHARD} is damaged"),
        (SHARD, Path.unlink, f"{SHARD} is missing"),
        (INDEX, flip, "metadata is damaged"),
        (STATE_FILE, cut, "not valid JSON"),
        (STATE_FILE, Path.unlink, "file not found"),
        (STATE_FILE, stale, "not a training state of this version"),
    ],
)
def test_a_damaged_state_is_passed_over(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    save(tmp_path, 3)
    save(tmp_path, 4)
    damage(tmp_path / STATES_FOLDER / "step-00000004" / name)
    state, damaged = load_state(tmp_path, empty())
    assert state.step == 3
    assert len(damaged) == 1
    assert "step-00000004" in damaged[0] and message in damaged[0]
    save(tmp_path, 4, keep_last=1)
    assert names(tmp_path) == ["damaged-step-00000004", "step-00000004"]
    damage(tmp_path / STATES_FOLDER / "step-00000004" / name)
    with pytest.raises(StateError, match=r"no saved state can be read: .*step-00000004"):
        load_state(tmp_path, empty())


def test_missing(tmp_path: Path) -> None:
    assert not has_states(tmp_path)
    with pytest.raises(StateError, match="states: no saved state to resume from"):
        load_state(tmp_path, empty())


def test_another_model(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(StateError, match=r"no saved state can be read: .*model.other"):
        load_state(tmp_path, {"model.other": torch.zeros(2)})
    with pytest.raises(StateError, match=r"no saved state can be read: .*model.weight"):
        load_state(tmp_path, {"model.weight": torch.zeros(9, 9)})


def test_a_pickle_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one in the index's place nor one among the tensors that the index leads to."""
    save(tmp_path, 3)
    folder = tmp_path / STATES_FOLDER / "step-00000003"
    monkeypatch.setattr(training.state, "_checksums", lambda *_: json.loads((folder / STATE_FILE).read_text())["files"])
    index = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(StateError, match="which is no part of an index"):
        load_state(tmp_path, empty())
    content = pickle.loads(index)
    content.state_dict_metadata["rng"] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    (folder / INDEX).write_bytes(pickle.dumps(content))
    with pytest.raises(StateError, match="holds entries that are no tensors"):
        load_state(tmp_path, empty())
    assert not (tmp_path / "ran").exists()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))
