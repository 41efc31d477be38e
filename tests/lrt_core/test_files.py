from __future__ import annotations

from pathlib import Path

import pytest

from lrt_core.files import CheckpointError, backup_of, existing, replaced_directory, write_text

OURS = {"a", "b", "sub", "sub/c"}.__contains__


def write(folder: Path, name: str, text: str) -> None:
    with replaced_directory(folder, OURS) as new:
        write_text(new / name, text)


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "deep" / "out", OURS) as new:
        write_text(new / "a", "ü")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_bytes() == "ü".encode()
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_replacing_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    write(tmp_path / "out", "a", "1")
    write(tmp_path / "out", "b", "2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_the_old_untouched(tmp_path: Path) -> None:
    write(tmp_path / "out", "a", "1")
    with pytest.raises(KeyboardInterrupt), replaced_directory(tmp_path / "out", OURS) as new:
        write_text(new / "a", "2")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_brings_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "a", "1")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk on fire"):
        write(tmp_path / "out", "a", "2")
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_is_readable_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rename a crash comes before or after, `existing` finds a whole folder."""
    out = tmp_path / "out"
    write(out, "a", "1")
    seen = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        seen.append((existing(out) / "a").read_text())
        result = rename(self, target)
        seen.append((existing(out) / "a").read_text())
        return result

    monkeypatch.setattr(Path, "rename", watched)
    write(out, "a", "2")
    assert seen == ["1", "1", "1", "2"]


def test_a_stale_backup_is_not_mistaken_for_the_current(tmp_path: Path) -> None:
    write(tmp_path / "out", "a", "1")
    backup_of(tmp_path / "out").mkdir()
    assert existing(tmp_path / "out") == (tmp_path / "out").resolve()
    write(tmp_path / "out", "a", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["thesis.tex", "sub/thesis.tex"])
def test_foreign_files_are_never_deleted(tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / name).write_text("years of work")
    with pytest.raises(CheckpointError, match=f"will not replace a folder that also holds {name}"):
        write(tmp_path / "out", "a", "1")
    assert (tmp_path / "out" / name).read_text() == "years of work"


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not a directory"):
        write(tmp_path / "out", "a", "1")


def test_a_link_keeps_pointing_to_what_was_replaced(tmp_path: Path) -> None:
    write(tmp_path / "real", "a", "1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "a", "2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "2"
