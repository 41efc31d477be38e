"""Corpora: which documents there are, and which of them validate.

`python-sources` is the running interpreter's standard library and installed packages; anything else is a path to a .txt,
.py, .md, .jsonl or .jsonl.gz file or a folder of such. Documents are held in memory and split into training and validation
by a hash of their name (a path relative to its root), which therefore stays on its side when others come or go.
Neighbour: `packing.py` turns documents into rows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from training.config import PYTHON_SOURCES

TEXT_SUFFIXES = (".txt", ".py", ".md")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz")
TEXT_CHARACTERS = 16_384
"""A text file is cut into documents of about this length at blank lines, so that one long file can be split."""


class DataError(ValueError):
    """A corpus that cannot be read or used; the message names the file."""


class Document(NamedTuple):
    """name: path relative to its corpus' root, with a piece or line number where a file holds several."""

    name: str
    text: str


@dataclass
class Corpus:
    """Training and validation documents in a fixed order; `skipped` says of each corrupt record where and why."""

    train: list[Document] = field(default_factory=list)
    validation: list[Document] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Changes when any document is added, removed, renamed or edited in length."""
        digest = hashlib.sha256()
        for side in (self.train, self.validation):
            for document in side:
                digest.update(f"{document.name}\0{len(document.text)}\0".encode("utf-8", "surrogatepass"))
            digest.update(b"\1")
        return digest.hexdigest()


def load_corpus(sources: Sequence[str], validation_fraction: float, piece_characters: int) -> Corpus:
    """Read every source; DataError when a path is missing, a file cannot be read or too little is left to split.

    Identical texts count once. A corrupt jsonl record is skipped and reported in `skipped`. After the split, training documents
    are cut into pieces of about `piece_characters` at blank lines: a long document read from end to end would rule a
    hundred steps in a row, and the model would follow it instead of learning from all.
    """
    corpus = Corpus()
    documents: list[Document] = []
    for source in sources:
        documents += python_sources() if source == PYTHON_SOURCES else _read_path(Path(source), corpus.skipped)
    unique: dict[bytes, Document] = {}
    for document in documents:
        unique.setdefault(hashlib.sha256(document.text.encode("utf-8")).digest(), document)
    if len(unique) < 2:
        raise DataError(f"{', '.join(sources)}: training and validation need two different documents, got {len(unique)}")
    _split(corpus, list(unique.values()), validation_fraction)
    corpus.train = [
        Document(f"{document.name}@{index}", piece)
        for document in corpus.train
        for index, piece in enumerate(_pieces(document.text, piece_characters))
    ]
    return corpus


def read_texts(sources: Sequence[str]) -> list[str]:
    """The texts of every source, in order, without a split; DataError when a path is missing or cannot be read."""
    skipped: list[str] = []
    found = [python_sources() if source == PYTHON_SOURCES else _read_path(Path(source), skipped) for source in sources]
    if skipped:
        raise DataError(f"{len(skipped)} corrupt record(s), the first: {skipped[0]}")
    return [document.text for documents in found for document in documents]


def _split(corpus: Corpus, documents: list[Document], validation_fraction: float) -> None:
    """By hash; where the hash gives one side nothing, that side gets the document nearest to it."""
    ranked = sorted(documents, key=lambda document: (_hash(document.name), document.name))
    boundary = sum(_hash(document.name) < validation_fraction for document in ranked)
    boundary = min(max(boundary, 1), len(ranked) - 1)
    chosen = set(ranked[:boundary])
    for document in sorted(documents):
        (corpus.validation if document in chosen else corpus.train).append(document)


def _hash(name: str) -> float:
    """A number in 0..1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def _read_path(path: Path, skipped: list[str]) -> list[Document]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file():
        return _read_file(path, path.name, skipped)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(TEXT_SUFFIXES + RECORD_SUFFIXES))
    documents = [document for file in files for document in _read_file(file, file.relative_to(path).as_posix(), skipped)]
    if not documents:
        raise DataError(f"{path}: no text in any {', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)} file")
    return documents


def _read_file(path: Path, name: str, skipped: list[str]) -> list[Document]:
    try:
        if path.name.endswith(RECORD_SUFFIXES):
            return _read_records(path, name, skipped)
        if path.name.endswith(TEXT_SUFFIXES):
            return [
                Document(f"{name}#{index}", piece)
                for index, piece in enumerate(_pieces(path.read_text("utf-8"), TEXT_CHARACTERS))
            ]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    raise DataError(f"{path}: unknown kind of file, expected {', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}")


def _pieces(text: str, num_characters: int) -> Iterator[str]:
    """The text in parts of at least `num_characters` that begin and end at blank lines; the last may be shorter."""
    piece: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        length += len(paragraph) + 2
        if length >= num_characters:
            yield "\n\n".join(piece)
            piece, length = [], 0
    if any(paragraph.strip() for paragraph in piece):
        yield "\n\n".join(piece)


def _read_records(path: Path, name: str, skipped: list[str]) -> list[Document]:
    """One document per line that is an object with a string `text`; empty lines are ignored, other lines skipped."""
    documents = []
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                documents.append(Document(f"{name}#{number}", _record_text(line)))
            except (ValueError, RecursionError) as error:
                skipped.append(f"{path}: line {number}: {error}")
    if not documents:
        raise DataError(f"{path}: no line is a JSON object with a string `text`")
    return documents


def _record_text(line: bytes) -> str:
    record = json.loads(line.decode("utf-8"))
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text:
        raise ValueError("not an object with a non-empty string `text`")
    text.encode("utf-8")
    return text


def python_sources(roots: Sequence[Path] | None = None) -> list[Document]:
    """Hand-written Python of the running interpreter: standard library and installed packages, each named below its root.

    Files that are data rather than code are left out (`_is_handwritten`), and so is what is not UTF-8.
    """
    if roots is None:
        paths = sysconfig.get_paths()
        packages = [Path(paths[key]).resolve() for key in ("purelib", "platlib")]
        library = Path(paths["stdlib"]).resolve()
        roots = list(dict.fromkeys([library, library / "site-packages", *packages]))
    documents = {}
    for root in roots:
        nested = [other for other in roots if other != root and root in other.parents]
        for file in sorted(root.rglob("*.py")):
            if not file.is_file() or any(other in file.parents for other in nested):
                continue
            name = file.relative_to(root).as_posix()
            text = _read_source(file)
            if text is not None and _is_handwritten(name, text):
                documents[name] = Document(name, text)
    return list(documents.values())


def _read_source(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None  # a few packages ship files in other encodings, or broken on purpose, as test data


_LENGTHS = range(200, 200_000)
_TEST_FOLDERS = {"test", "tests", "testing", "_tests"}
_GENERATED = ("generated by", "auto-generated", "autogenerated", "automatically generated", "do not edit")


def _is_handwritten(name: str, text: str) -> bool:
    """Whether a file looks like code that somebody wrote to be read: not tiny or huge, no test, not generated, no table."""
    path = Path(name)
    if len(text) not in _LENGTHS or path.name.startswith("test_") or _TEST_FOLDERS & set(path.parts):
        return False
    head = text[:1000].lower()
    num_digits = sum(text.count(digit) for digit in "0123456789")
    num_foreign = 0 if text.isascii() else len(text.encode("utf-8")) - len(text)
    return (
        not any(mark in head for mark in _GENERATED)
        and num_digits <= 0.06 * len(text)
        and num_foreign <= 0.01 * len(text)
        and max(map(len, text.splitlines())) <= 300
    )
