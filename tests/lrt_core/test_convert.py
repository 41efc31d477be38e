from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lrt_core.checkpoint import load_model, load_tensors, load_tokenizer
from lrt_core.convert import find_checkpoint, main
from lrt_core.files import CheckpointError
from tests.helpers import GOLDEN, PLAIN_GOLDEN

CASE = GOLDEN / "lrt-layerwise"


def convert(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """nanochat's base folder: two kinds of checkpoints, one tokenizer."""
    root = tmp_path / "base"
    shutil.copytree(CASE / "checkpoint", root / "base_checkpoints" / "d4")
    shutil.copytree(GOLDEN / PLAIN_GOLDEN / "checkpoint", root / "chatsft_checkpoints" / "d4")
    shutil.copytree(CASE / "tokenizer", root / "tokenizer")
    return root


def copy_step(folder: Path, step: int) -> None:
    for stem, ending in (("model", "pt"), ("meta", "json")):
        shutil.copy(folder / f"{stem}_000100.{ending}", folder / f"{stem}_{step:06d}.{ending}")


def test_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(CASE, tmp_path / "ours") == 0
    said = capsys.readouterr().out
    assert "4 layers, hidden size 64, vocabulary 300, layerwise recurrence from layer 3" in said
    assert "step 100" in said
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "layerwise recurrence" in card and "1.234" in card
    assert load_model(tmp_path / "ours").config.num_layers == 4
    assert convert("--to-official", tmp_path / "ours", tmp_path / "theirs") == 0
    names = sorted(path.relative_to(tmp_path / "theirs").as_posix() for path in (tmp_path / "theirs").glob("*/*"))
    assert names == sorted(path.relative_to(CASE).as_posix() for path in CASE.glob("*/*"))
    assert convert(tmp_path / "theirs", tmp_path / "again") == 0
    for path in (tmp_path / "ours").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_as_a_program(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    command = [sys.executable, "-m", "lrt_core.convert", str(CASE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"lrt-convert: {tmp_path}: exists and is not empty; --force replaces an earlier conversion\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(dtype: str, tmp_path: Path) -> None:
    assert convert(CASE, tmp_path / "ours", "--dtype", dtype) == 0
    tensors = load_tensors(tmp_path / "ours")
    assert tensors["head.weight"].dtype == getattr(torch, dtype)
    assert tensors["memory_scale"].dtype == torch.float32


@pytest.mark.parametrize(
    "place",
    [
        lambda base: base / "base_checkpoints" / "d4",
        lambda base: base / "base_checkpoints",
        lambda base: base,
    ],
)
def test_layouts_of_nanochat(place: Callable[[Path], Path], base: Path, tmp_path: Path) -> None:
    shutil.rmtree(base / "chatsft_checkpoints")
    assert convert(place(base), tmp_path / "ours") == 0
    assert load_tokenizer(tmp_path / "ours").vocab_size == 300


def test_checkpoint_folder_finds_its_sibling_tokenizer(tmp_path: Path) -> None:
    assert convert(CASE / "checkpoint", tmp_path / "ours") == 0


def test_relative_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CASE / "checkpoint")
    assert convert(".", tmp_path / "ours") == 0


def test_several_checkpoints_are_listed(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(base, tmp_path / "ours") == 1
    error = capsys.readouterr().err
    assert "holds several checkpoints" in error
    assert str(base / "base_checkpoints" / "d4") in error
    assert str(base / "chatsft_checkpoints" / "d4") in error
    assert convert(base / "chatsft_checkpoints", tmp_path / "ours") == 0
    assert load_model(tmp_path / "ours").config.recurrence is None


def test_latest_step_unless_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = base / "base_checkpoints" / "d4"
    copy_step(folder, 99)
    copy_step(folder, 1000000)
    (folder / "model_000200_backup.pt").write_bytes(b"not one")
    assert convert(folder, tmp_path / "latest") == 0
    assert "step 1000000" in capsys.readouterr().out
    assert convert(folder, tmp_path / "chosen", "--step", 99) == 0
    assert "step 99" in capsys.readouterr().out
    assert convert(folder, tmp_path / "absent", "--step", 7) == 1
    assert "has no step 7; it has 99, 100, 1000000" in capsys.readouterr().err


def test_tokenizer_elsewhere(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "tokenizer").rename(tmp_path / "elsewhere")
    source = base / "base_checkpoints"
    assert convert(source, tmp_path / "ours") == 1
    assert "say where it is with --tokenizer" in capsys.readouterr().err
    assert convert(source, tmp_path / "ours", "--tokenizer", tmp_path) == 1
    assert f"no tokenizer.pkl in {tmp_path}" in capsys.readouterr().err
    assert convert(source, tmp_path / "ours", "--tokenizer", tmp_path / "elsewhere") == 0


def test_tokenizer_of_another_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = base / "base_checkpoints" / "d4" / "meta_000100.json"
    path.write_text(path.read_text().replace('"vocab_size": 300', '"vocab_size": 301'))
    assert convert(base / "base_checkpoints", tmp_path / "ours") == 1
    assert "the tokenizer has 300 tokens, config.vocab_size is 301" in capsys.readouterr().err


def test_out_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ours").mkdir()
    assert convert(CASE, tmp_path / "ours") == 0, "an empty folder is no obstacle"
    assert convert(GOLDEN / PLAIN_GOLDEN, tmp_path / "ours") == 1
    assert "--force" in capsys.readouterr().err
    assert load_model(tmp_path / "ours").config.recurrence is not None
    assert convert(GOLDEN / PLAIN_GOLDEN, tmp_path / "ours", "--force") == 0
    assert load_model(tmp_path / "ours").config.recurrence is None
    assert not (tmp_path / ".ours.previous").exists()


def test_force_never_deletes_what_is_no_conversion(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(CASE, base, "--force") == 1
    assert "will not replace a folder that also holds" in capsys.readouterr().err
    assert convert(CASE, tmp_path / "ours") == 0
    shutil.copytree(CASE, tmp_path / "theirs")
    (tmp_path / "theirs" / "expected.safetensors").unlink()
    assert convert("--to-official", tmp_path / "ours", tmp_path / "theirs", "--force") == 0
    (tmp_path / "theirs" / "checkpoint" / "optim_000100_rank0.pt").write_bytes(b"hours")
    assert convert("--to-official", tmp_path / "ours", tmp_path / "theirs", "--force") == 1
    assert (tmp_path / "theirs" / "checkpoint" / "optim_000100_rank0.pt").exists()


def test_out_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ours").write_text("mine")
    assert convert(CASE, tmp_path / "ours", "--force") == 1
    assert "is not a directory" in capsys.readouterr().err


def test_wrong_sources_are_explained(golden_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a directory"):
        find_checkpoint(CASE / "expected.safetensors")
    with pytest.raises(CheckpointError, match=r"no model_\*\.pt here"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"already a checkpoint of this project \(--to-official"):
        find_checkpoint(golden_checkpoints["lrt-layerwise"])


@pytest.mark.parametrize("extra", [["--step", "3"], ["--tokenizer", "x"]])
def test_options_without_meaning_are_refused(extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        convert("--to-official", tmp_path, tmp_path / "out", *extra)
    assert stopped.value.code == 2
    assert "no meaning with --to-official" in capsys.readouterr().err


def test_to_official_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("--to-official", CASE, tmp_path / "out") == 1
    assert "config.json: file not found" in capsys.readouterr().err
