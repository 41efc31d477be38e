"""Documents, the files that they come from, and the side of the split on which each belongs.

Files are found first and read later, as streams, so that a corpus may be larger than the memory. Neighbours: `records.py` and
`python_files.py` read the kinds of files, `corpus.py` holds a small corpus in memory, `sharding.py` writes a large one as ids.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from training.config import PYTHON_LIBRARY, PYTHON_SOURCES
from training.data.python_files import handwritten, python_files
from training.data.records import RECORD_SUFFIXES, DataError, conversation_of, read_records, text_of

TEXT_SUFFIXES = (".txt", ".py", ".md")
TEXT_CHARACTERS = 16_384
"""A text file is cut into documents of about this length at blank lines, so that one long file can be split."""
MAX_PARAGRAPH_CHARACTERS = 64 * TEXT_CHARACTERS
"""Where a text has no blank line for so long, it is cut at the end of a line, or anywhere."""
_BLOCK_CHARACTERS = 1 << 18


class Document(NamedTuple):
    """name: path relative to its corpus' root, with a piece or line number where a file holds several.

    text: of a conversation, its messages as JSON.
    """

    name: str
    text: str


class SourceFile(NamedTuple):
    """A file of a corpus and its name in there. is_code: a Python file of which to take only what was written by hand."""

    path: Path
    name: str
    is_code: bool = False


@dataclass(frozen=True)
class Sources:
    """The files of a corpus in their fixed order. conversations: whether to read messages instead of text."""

    names: tuple[str, ...]
    files: tuple[SourceFile, ...]
    conversations: bool = False

    @classmethod
    def find(cls, names: Sequence[str], conversations: bool = False) -> Sources:
        """Look for every source's files; DataError when a path is missing or holds nothing of a known kind.

        Of a folder hidden files and folders are left out, unless they are named themselves.
        """
        files: list[SourceFile] = []
        for name in names:
            if name in (PYTHON_SOURCES, PYTHON_LIBRARY):
                if conversations:
                    raise DataError(f"{name}: holds no conversations")
                files += [SourceFile(path, own, True) for own, path in python_files(name == PYTHON_SOURCES).items()]
            else:
                files += _files(Path(name), RECORD_SUFFIXES if conversations else TEXT_SUFFIXES + RECORD_SUFFIXES)
        return cls(tuple(names), tuple(files), conversations)

    @property
    def num_bytes(self) -> int:
        """Size of all files, compressed as they are."""
        return sum(file.path.stat().st_size for file in self.files)

    def stamp(self) -> str:
        """Changes when a file is added, removed, renamed or written to; the files are not read."""
        digest = hashlib.sha256(b"conversations" if self.conversations else b"text")
        for file in self.files:
            status = file.path.stat()
            line = f"{file.name}\0{file.is_code}\0{status.st_size}\0{status.st_mtime_ns}\0"
            digest.update(line.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def documents(
        self, skip: Callable[[str], None], advance: Callable[[int], None] = lambda num_bytes: None
    ) -> Iterator[Document]:
        """Every document in order. skip: told of each corrupt record; advance: told how many bytes of a file were read.

        DataError names a file that cannot be read; or the sources, where there is none.
        """
        is_empty = True
        for file in self.files:
            try:
                for document in self._read(file, skip, advance):
                    is_empty = False
                    yield document
            except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
                raise DataError(f"{file.path}: cannot be read: {error}") from None
        if is_empty and self.files:
            what = "conversation" if self.conversations else "text"
            raise DataError(
                f"{', '.join(self.names)}: no {what} in {len(self.files):,} file(s), the first {self.files[0].path}"
            )

    def _read(self, file: SourceFile, skip: Callable[[str], None], advance: Callable[[int], None]) -> Iterator[Document]:
        if file.is_code:
            advance(file.path.stat().st_size)
            text = handwritten(file.path)
            if text is not None:
                yield Document(file.name, text)
        elif file.path.name.endswith(TEXT_SUFFIXES):
            for index, piece in enumerate(pieces(_blocks(file.path, advance), TEXT_CHARACTERS)):
                yield Document(f"{file.name}#{index}", piece)
        else:
            content = conversation_of if self.conversations else text_of
            for number, text in read_records(file.path, content, skip, advance):
                yield Document(f"{file.name}#{number}", text)


def _files(path: Path, suffixes: tuple[str, ...]) -> list[SourceFile]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    kinds = ", ".join(suffixes)
    if path.is_file():
        if not path.name.endswith(suffixes):
            raise DataError(f"{path}: unknown kind of file, expected {kinds}")
        return [SourceFile(path, path.name)]
    found = sorted(file for file in _seen(path) if file.name.endswith(suffixes) and file.is_file())
    if not found:
        raise DataError(f"{path}: no text in any {kinds} file")
    return [SourceFile(file, file.relative_to(path).as_posix()) for file in found]


def _seen(folder: Path) -> Iterator[Path]:
    """Everything in a folder and its folders that is not hidden, as names with a dot before them are."""
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}")


def _blocks(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    """A UTF-8 file's text in blocks, line ends as `\\n`, without the mark that some editors put at its start."""
    with path.open(encoding="utf-8-sig") as file:
        while block := file.read(_BLOCK_CHARACTERS):
            advance(len(block) if block.isascii() else len(block.encode("utf-8")))
            yield block


def pieces(blocks: Iterator[str] | Sequence[str], num_characters: int) -> Iterator[str]:
    """A text in parts of at least `num_characters` that begin and end at blank lines; the last may be shorter.

    blocks: the text, cut anywhere.
    """
    piece: list[str] = []
    length = 0
    for paragraph in _paragraphs(blocks):
        piece.append(paragraph)
        length += len(paragraph) + 2
        if length >= num_characters:
            yield "\n\n".join(piece)
            piece, length = [], 0
    if any(paragraph.strip() for paragraph in piece):
        yield "\n\n".join(piece)


def _paragraphs(blocks: Iterator[str] | Sequence[str]) -> Iterator[str]:
    """What stands between blank lines, wherever the blocks end; paragraphs that are too long in parts."""
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split("\n\n")
        for paragraph in whole:
            yield from _parts(paragraph)
        *parts, rest = _parts(rest)
        yield from parts
    yield rest


def _parts(paragraph: str) -> list[str]:
    parts = []
    while len(paragraph) > MAX_PARAGRAPH_CHARACTERS:
        end = paragraph.rfind("\n", 1, MAX_PARAGRAPH_CHARACTERS) + 1 or MAX_PARAGRAPH_CHARACTERS
        parts.append(paragraph[:end])
        paragraph = paragraph[end:]
    return [*parts, paragraph]


def advancing(bar: tqdm[Any]) -> Callable[[int], None]:
    """What moves a bar on by so many bytes."""

    def advance(num_bytes: int) -> None:
        bar.update(num_bytes)

    return advance


def hash64(text: str) -> int:
    """64 bits of a name or text, the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def validation_limit(fraction: float) -> int:
    """Documents whose name's hash is below it validate."""
    return int(fraction * 2**64)


def fitting_limit(limit: int, hashes: Sequence[int], sources: Sequence[str]) -> int:
    """The limit, moved where it would give one side nothing: that side then gets the document nearest to it.

    hashes: of the names of all documents of the sources, at least two of which must differ; else it is a DataError.
    """
    lowest, highest = min(hashes, default=0), max(hashes, default=0)
    if lowest == highest:
        raise DataError(f"{', '.join(sources)}: training and validation need two documents of different names")
    return min(max(limit, lowest + 1), highest)
