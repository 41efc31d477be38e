"""Shards: a corpus as ids in files of bounded size, with an index, read by memory map.

A set of shards is a folder that appears whole, under its final name, when it is complete:
    meta.json         what it was made of, counts, and every other file's size and checksum
    train.npy         ENTRY per training piece, in order; of conversations, the whole
    validation.npy    ENTRY per validation document
    00000.bin ...     ids as little-endian integers of 2 or 4 bytes, each document in one file
    00000.mask ...    of conversations: a byte per id, 1 for what is a target
    skipped.txt       every corrupt record that was left out, and why
    cut.txt           every conversation that was shortened
Neighbours: `sharding.py` writes them, `encode.py` defines ENTRY, `packing.py` reads rows.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrt_core.files import CheckpointError, check_keys, read_json
from training.data.encode import ENTRY, Ids
from training.data.records import DataError

VERSION = 1
META_FILE = "meta.json"
INDEX_FILES = ("train.npy", "validation.npy")
SKIPPED_FILE, CUT_FILE = "skipped.txt", "cut.txt"
META_KEYS = {
    *("version", "key", "fingerprint", "id_bytes", "conversations", "shard_starts", "files"),
    *("num_documents", "num_tokens", "num_skipped", "first_skipped", "num_cut", "first_cut"),
}
_READ_BYTES = 1 << 22


def shard_name(number: int) -> str:
    """The file of a shard's ids."""
    return f"{number:05}.bin"


def mask_name(number: int) -> str:
    """The file of a shard's loss mask."""
    return f"{number:05}.mask"


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value


class ShardSet:
    """A complete set on the disk. DataError names a file that is missing or damaged and says what to do.

    Sizes and the indices are checked at once, every shard's content when the first of its documents is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta = read_json(folder / META_FILE)
            check_keys(folder / META_FILE, self.meta, META_KEYS)
        except CheckpointError as error:
            raise self._damaged(META_FILE, str(error)) from None
        for name, (size, _) in self.meta["files"].items():
            if not (folder / name).is_file():
                raise self._damaged(name, "missing")
            if (found := (folder / name).stat().st_size) != size:
                raise self._damaged(name, f"{found:,} bytes long instead of {size:,}")
        self._starts: list[int] = self.meta["shard_starts"]
        for number, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            if (end - start) * self.meta["id_bytes"] != self.meta["files"][shard_name(number)][0]:
                raise self._damaged(META_FILE, f"{shard_name(number)} is of another size than it says")
        self._maps: dict[str, NDArray[Any]] = {}
        self.conversations: bool = self.meta["conversations"]

    def index(self, name: str) -> NDArray[Any]:
        """The entries [N] of a side, by the name of its file."""
        self._check(name)
        entries: NDArray[Any] = np.load(self.folder / name, mmap_mode="r")
        assert entries.dtype == ENTRY
        return entries

    def read(self, start: int, length: int) -> Ids:
        """Ids [length] from a place on that an entry names, complements where they are no targets."""
        shard = bisect_right(self._starts, start) - 1
        place = slice(start - self._starts[shard], start - self._starts[shard] + length)
        ids = self._map(shard_name(shard), f"<u{self.meta['id_bytes']}")[place].astype(np.int64)
        return np.where(self._map(mask_name(shard), "<u1")[place], ids, ~ids) if self.conversations else ids

    def _map(self, name: str, dtype: str) -> NDArray[Any]:
        if name not in self._maps:
            self._check(name)
            self._maps[name] = np.memmap(self.folder / name, dtype, mode="r")
        return self._maps[name]

    def _check(self, name: str) -> None:
        if checksum(self.folder / name) != self.meta["files"][name][1]:
            raise self._damaged(name, "not what was written (its checksum differs)")

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(
            f"{self.folder / name}: damaged: {what}; delete the folder {self.folder} and start again: it is made anew"
        )


class ShardedDocuments:
    """One side of a corpus as a `TokenSource`. cuts: the same documents with cuts, in a set of their own."""

    def __init__(self, shards: ShardSet, side: str, cuts: ShardSet | None = None) -> None:
        self.shards, self.cuts = shards, cuts
        self.entries, self.cut_entries = shards.index(side), None if cuts is None else cuts.index(side)
        if cuts is not None and not np.array_equal(cuts.index(side)["name"], self.entries["name"]):
            raise DataError(f"{cuts.folder}: made of other documents than {shards.folder}; delete both and start again")

    @property
    def keeps_whole(self) -> bool:
        """See TokenSource."""
        return self.shards.conversations

    def __len__(self) -> int:
        return len(self.entries)

    def num_tokens(self, index: int, cut_share: float) -> int:
        """See TokenSource."""
        return int(self._entries(cut_share)[index]["length"])

    def ids(self, index: int, cut_share: float) -> Ids:
        """See TokenSource; any share above 0 is that of the set with cuts."""
        entry = self._entries(cut_share)[index]
        shards = self.cuts if cut_share > 0 else self.shards
        assert shards is not None
        return shards.read(int(entry["start"]), int(entry["length"]))

    def _entries(self, cut_share: float) -> NDArray[Any]:
        entries = self.cut_entries if cut_share > 0 else self.entries
        if entries is None:
            raise ValueError("these shards were made without cuts")
        return entries


class ShardedCorpus:
    """A corpus on the disk, in the place of a `Corpus`; cuts as in ShardedDocuments. note: a remark on where it comes from."""

    def __init__(self, shards: ShardSet, cuts: ShardSet | None = None, *, note: str = "") -> None:
        self.shards, self.note = shards, note
        self.train = ShardedDocuments(shards, INDEX_FILES[0], cuts)
        self.validation = ShardedDocuments(shards, INDEX_FILES[1])
        meta = shards.meta
        self.num_skipped: int = meta["num_skipped"]
        self.num_cut: int = meta["num_cut"]

    def fingerprint(self) -> str:
        """Changes when any document is added, removed, renamed or edited, or is encoded otherwise."""
        return str(self.shards.meta["fingerprint"])

    @property
    def num_characters(self) -> int:
        """Of the training documents."""
        return int(self.train.entries["characters"].sum(dtype=np.int64))

    def remarks(self) -> list[str]:
        """The note, and lines on what was left out or shortened, each with the first case and the file that lists all."""
        meta, folder = self.shards.meta, self.shards.folder
        kinds = (("skipped", "corrupt record(s)", SKIPPED_FILE), ("cut", "conversation(s) to a row's length", CUT_FILE))
        return [self.note] * bool(self.note) + [
            f"{verb} {meta[f'num_{verb}']:,} {what}, the first: {meta[f'first_{verb}']} (all: {folder / name})"
            for verb, what, name in kinds
            if meta[f"num_{verb}"]
        ]
