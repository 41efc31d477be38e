"""The state file: exact, atomic, and damage that is named."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from training.state import STATE_FILE, StateError, TrainingState, load_state, save_state


def make_state(step: int = 3) -> TrainingState:
    return TrainingState(
        step=step,
        elapsed=1.5,
        position={"epoch": 0, "num_dealt": 2, "lanes": [{"document": 1, "offset": 7}]},
        data_fingerprint="abc",
        model={"weight": torch.arange(4.0)},
        optimizer={"muon": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}},
        rng=torch.get_rng_state(),
        guard={"num_skipped": 1, "losses": [2.5], "norms": [0.1], "skips": [True, False]},
    )


def test_round_trip(tmp_path: Path) -> None:
    state = make_state()
    save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    assert str(asdict(loaded)) == str(asdict(state))
    assert torch.equal(loaded.rng, state.rng)


def test_the_old_state_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, make_state(3))

    def disk_full(data: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, make_state(4))
    assert load_state(tmp_path).step == 3


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=rf"{STATE_FILE}: no saved state"):
        load_state(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 1500])
def test_truncated(tmp_path: Path, keep: int) -> None:
    save_state(tmp_path, make_state())
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StateError, match="cannot be read"):
        load_state(tmp_path)


def test_other_content(tmp_path: Path) -> None:
    torch.save({"step": 3}, tmp_path / STATE_FILE)
    with pytest.raises(StateError, match="not a training state"):
        load_state(tmp_path)


def test_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"step": Malicious()}, tmp_path / STATE_FILE)
    with pytest.raises(StateError, match="cannot be read"):
        load_state(tmp_path)
    assert not (tmp_path / "ran").exists()
