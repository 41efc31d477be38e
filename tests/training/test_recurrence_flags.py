"""The flags of the recurrence, from the command line to the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrt_core.checkpoint import load_config
from training.__main__ import main


def train(data: Path, *arguments: str) -> int:
    return main(["--preset", "tiny", "--data", str(data), "--steps", "1", "--device", "cpu", *arguments])


def test_they_reach_the_checkpoint_and_the_card(data: Path, tmp_path: Path) -> None:
    flags = ["--recurrence", "shared", "--source-layer", "0", "--no-residual-injection"]
    assert train(data, "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *flags) == 0
    recurrence = load_config(tmp_path / "out").recurrence
    assert recurrence is not None
    assert (recurrence.variant, recurrence.source_layer) == ("shared", 0)
    assert (recurrence.residual_injection, recurrence.kv_projection) == (False, True)
    assert "--recurrence shared --source-layer 0 --no-residual-injection" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule", "baseline", "--source-layer", "1"], "--source-layer needs a recurrent schedule, and baseline is not"),
        (["--source-layer", "2"], "recurrence.source_layer must lie in 0..1, got 2"),
        (["--no-residual-injection", "--no-kv-projection"], "needs residual_injection, kv_projection or both"),
    ],
)
def test_what_cannot_be_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert train(data, "--run", str(tmp_path / "run"), *flags) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
