"""Strict reading and atomic writing of a checkpoint's files; `tokenizer.py` and `checkpoint.py` stand on it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and the tensor or key."""


def read_text(path: Path) -> str:
    """The UTF-8 text of a file; CheckpointError when it is missing, unreadable or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError on broken JSON, another type, a repeated key or NaN and Infinity."""
    text = read_text(path)
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(data).__name__}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"repeated key {next(key for key in keys if keys.count(key) > 1)!r}")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def check_keys(path: Path, data: dict[str, Any], expected: set[str]) -> None:
    """CheckpointError naming the file unless `data` has exactly the expected keys."""
    unknown, missing = sorted(set(data) - expected), sorted(expected - set(data))
    if unknown:
        raise CheckpointError(f"{path}: unknown key(s): {', '.join(unknown)}")
    if missing:
        raise CheckpointError(f"{path}: missing key(s): {', '.join(missing)}")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text through to the disk."""
    path.write_bytes(text.encode("utf-8"))
    sync(path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON object through to the disk, indented for readers."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """Force a file's or a directory's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def backup_of(directory: Path) -> Path:
    """Where the replaced content of `directory` rests between the two renames of `replaced_directory`."""
    return directory.with_name(f".{directory.name}.previous")


def existing(directory: Path) -> Path:
    """The directory to read: `directory`, or its backup when a writer died between the two renames.

    CheckpointError when neither exists.
    """
    directory = directory.resolve()
    for candidate in (directory, backup_of(directory)):
        if candidate.is_dir():
            return candidate
    raise CheckpointError(f"{directory}: no such directory" if not directory.exists() else f"{directory}: not a directory")


@contextmanager
def replaced_directory(directory: Path, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty sibling folder that takes the place of `directory` when the block ends without an error.

    At every moment the old content, the new content or both are whole on the disk: the old folder is renamed to
    `backup_of(directory)`, the new one takes its name, then the backup goes; `existing` finds whichever is there. A folder that
    holds an entry, named relative to it, for which `is_ours` is false is never replaced (CheckpointError), so that a mistyped
    path costs nothing.
    """
    directory = directory.resolve()
    _check_replaceable(directory, is_ours)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        sync(temporary)
        _publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(directory: Path, is_ours: Callable[[str], bool]) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: exists and is not a directory")
    for entry in directory.rglob("*"):
        name = entry.relative_to(directory).as_posix()
        if not is_ours(name):
            raise CheckpointError(f"{directory}: will not replace a folder that also holds {name}")


def _publish(temporary: Path, directory: Path) -> None:
    backup = backup_of(directory)
    if directory.exists():
        if backup.exists():
            shutil.rmtree(backup)
        directory.rename(backup)
    try:
        temporary.rename(directory)
    except OSError:
        if backup.exists():
            backup.rename(directory)
        raise
    sync(directory.parent)
    if backup.exists():
        shutil.rmtree(backup)
