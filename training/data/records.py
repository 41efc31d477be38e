"""Files of records: JSON lines, plain or compressed, and parquet. All are read as streams.

A record that holds nothing to train on is skipped and named; a file that cannot be read is an error. Neighbour: `documents.py`.
"""

from __future__ import annotations

import codecs
import json
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ROLES = ("system", "user", "assistant")
MAX_LINE_BYTES = 1 << 26
"""A longer line of JSON is a corrupt record."""
_BLOCK_BYTES = 1 << 17
_BATCH_ROWS = 256

Skip = Callable[[str], None]
Advance = Callable[[int], None]


class DataError(ValueError):
    """A corpus that cannot be read or used; the message names the file."""


class _Decompressor(Protocol):
    """What zlib, zstandard and the standard library's zstd have in common; one for each member of a file."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def text_of(record: object) -> str:
    """A record's string `text`; ValueError without one."""
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text:
        raise ValueError("not an object with a non-empty string `text`")
    text.encode("utf-8")
    return text


def conversation_of(record: object) -> str:
    """A record's `messages`, each reduced to role and content, as JSON; ValueError says which of them is wrong."""
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("not an object with a non-empty list `messages`")
    kept = []
    for index, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise ValueError(f"messages[{index}]: `role` must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"messages[{index}]: `content` must be a string")
        content.encode("utf-8")
        kept.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" and message["content"] for message in kept):
        raise ValueError("no message of the assistant to learn from")
    return json.dumps(kept, ensure_ascii=False)


def read_records(path: Path, content: Callable[[object], str], skip: Skip, advance: Advance) -> Iterator[tuple[int, str]]:
    """Number (from 1) and content of each record; `skip` is told of those without, and of a file without records.

    DataError when the file cannot be read, none of its records has any, or a package for this kind of file is missing.
    """
    is_parquet = path.suffix == ".parquet"
    column = "messages" if content is conversation_of else "text"
    read = _parquet_values(path, column, advance) if is_parquet else _json_values(path, advance)
    count = number = 0
    for number, value in read:
        try:
            text = content(value())
        except (ValueError, RecursionError) as error:
            skip(f"{path}: {'row' if is_parquet else 'line'} {number}: {error}")
            continue
        count += 1
        yield number, text
    if not number:
        skip(f"{path}: empty")
    elif not count:
        kind = "a list `messages` to learn from" if content is conversation_of else "a string `text`"
        raise DataError(f"{path}: no {'row has' if is_parquet else 'line is a JSON object with'} {kind}")


def _json_values(path: Path, advance: Advance) -> Iterator[tuple[int, Callable[[], object]]]:
    """Number and parser of every line that is not empty."""
    for number, line in numbered_lines(_content(path, advance)):
        if number == 1 and line is not None:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line is None or line.strip():
            yield number, lambda line=line: _parsed(line)  # type: ignore[misc]


def _parsed(line: bytes | None) -> object:
    if line is None:
        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
    return json.loads(line.decode("utf-8"))


def numbered_lines(blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file that comes in blocks, from 1; None in place of one longer than MAX_LINE_BYTES."""
    held: list[bytes] = []
    number, size = 1, 0
    for block in blocks:
        *ends, last = block.split(b"\n")
        for end in ends:
            held.append(end)
            yield number, b"".join(held) if size + len(end) <= MAX_LINE_BYTES else None
            held, number, size = [], number + 1, 0
        size += len(last)
        held = [*held, last] if size <= MAX_LINE_BYTES else []
    if size:
        yield number, b"".join(held) if size <= MAX_LINE_BYTES else None


def _content(path: Path, advance: Advance) -> Iterator[bytes]:
    """A file's bytes in blocks, decompressed."""
    with path.open("rb") as file:
        blocks = _read_blocks(iter(lambda: file.read(_BLOCK_BYTES), b""), advance)
        if path.suffix == ".gz":
            yield from _decompressed(blocks, lambda: zlib.decompressobj(wbits=31))
        elif path.suffix == ".zst":
            make, error_kind = _zstd(path)
            try:
                yield from _decompressed(blocks, make)
            except error_kind as error:
                raise DataError(f"{path}: cannot be read: {error}") from None
        else:
            yield from blocks


def _read_blocks(blocks: Iterator[bytes], advance: Advance) -> Iterator[bytes]:
    for block in blocks:
        advance(len(block))
        yield block


def _decompressed(blocks: Iterator[bytes], make: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """Every member of a compressed file, one after the other; EOFError when the last is not whole."""
    member: _Decompressor | None = None
    for block in blocks:
        rest = block
        while rest:
            member = make() if member is None else member
            yield member.decompress(rest)
            rest = b""
            if member.eof:
                rest = member.unused_data.lstrip(b"\0")  # some writers fill up a file with zeros
                member = None
    if member is not None:
        raise EOFError("the compressed file ends too early")


def _zstd(path: Path) -> tuple[Callable[[], _Decompressor], type[Exception]]:
    """What makes a decompressor, and the error that it raises: from the standard library where it has one."""
    try:
        own = import_module("compression.zstd")
        return own.ZstdDecompressor, own.ZstdError
    except ImportError:
        package = _package(path, "zstandard")
    return lambda: package.ZstdDecompressor().decompressobj(), package.ZstdError


def _package(path: Path, name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{path}: needs the package {package}: pip install 'lrt-server[data]'") from None


def _parquet_values(path: Path, column: str, advance: Advance) -> Iterator[tuple[int, Callable[[], object]]]:
    """Number and reader of each row of one column, as a record of that column alone; a group of rows at a time."""
    arrow, parquet = _package(path, "pyarrow"), _package(path, "pyarrow.parquet")
    number, size = 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                return
            if column not in file.schema_arrow.names:
                raise DataError(f"{path}: has no column `{column}`, only {', '.join(file.schema_arrow.names)}")
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column]):
                    for value in batch.column(0):
                        number += 1
                        yield number, lambda value=value: {column: value.as_py()}  # type: ignore[misc]
                advance(size // file.num_row_groups)
    except arrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
