"""A corpus whose texts are held in memory, for small ones and for programs that have their own texts.

It has the same documents on the same sides, cut into the same pieces, as the shards that `sharding.py` makes. Neighbours:
`documents.py` reads, `packing.py` makes rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.data.documents import Document, Sources, fitting_limit, hash64, pieces, validation_limit
from training.data.python_files import handwritten, python_files
from training.data.records import DataError


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

    @property
    def num_characters(self) -> int:
        """Of the training documents."""
        return sum(len(document.text) for document in self.train)

    @property
    def num_skipped(self) -> int:
        """Records that were corrupt."""
        return len(self.skipped)


def load_corpus(sources: Sequence[str], validation_fraction: float, piece_characters: int) -> Corpus:
    """Read every source; DataError when a path is missing, a file cannot be read or too little is left to split.

    The split is that of shards, but for those of little text, where validation gets documents until they fill a row.
    Identical texts count once. A corrupt jsonl record is skipped and reported in `skipped`. After the split, training documents
    are cut into pieces of about `piece_characters` at blank lines: a long document read from end to end would rule a
    hundred steps in a row, and the model would follow it instead of learning from all.
    """
    corpus = Corpus()
    unique: dict[bytes, Document] = {}
    for document in Sources.find(sources).documents(corpus.skipped.append):
        unique.setdefault(hashlib.sha256(document.text.encode("utf-8")).digest(), document)
    if len(unique) < 2:
        raise DataError(f"{', '.join(sources)}: training and validation need two different documents, got {len(unique)}")
    hashes = [hash64(document.name) for document in unique.values()]
    limit = fitting_limit(validation_limit(validation_fraction), hashes, sources)
    for document, place in zip(unique.values(), hashes, strict=True):
        if place < limit:
            corpus.validation.append(document)
        else:
            corpus.train += training_pieces(document, piece_characters)
    return corpus


def training_pieces(document: Document, num_characters: int) -> list[Document]:
    """A document cut for training, its pieces named after it."""
    cut = pieces([document.text], num_characters)
    return [Document(f"{document.name}@{index}", piece) for index, piece in enumerate(cut)]


def read_texts(sources: Sequence[str]) -> list[str]:
    """The texts of every source, in order, without a split; DataError when a path is missing or cannot be read."""
    skipped: list[str] = []
    texts = [document.text for document in Sources.find(sources).documents(skipped.append)]
    if skipped:
        raise DataError(f"{len(skipped)} corrupt record(s), the first: {skipped[0]}")
    return texts


def python_sources(roots: Sequence[Path] | None = None) -> list[Document]:
    """Hand-written Python of the running interpreter: standard library and installed packages, each named below its root.

    Files that are data rather than code are left out, and so is what is not UTF-8.
    """
    found = ((name, handwritten(path)) for name, path in python_files(roots=roots).items())
    return [Document(name, text) for name, text in found if text is not None]
