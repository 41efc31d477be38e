"""Making shards: every document is read once and tokenised once, by several processes where there is much to do.

The set is written beside its final place and moved there when it is complete and on the disk, so that a process that is killed
leaves nothing that could be taken for a set; its remains go when the next one starts. A lock lets one process make a set while
others that want the same wait for it. Neighbours: `shards.py` says what lies in a set and reads it, `encode.py` encodes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lrt_core.files import replaced_directory, sync, write_json
from lrt_core.hardware import usable_processors
from lrt_core.tokenizer import Tokenizer
from training.data.documents import Document, Sources, advancing, fitting_limit, validation_limit
from training.data.encode import ENTRY, Batch, ConversationEncoder, Encoder
from training.data.records import DataError
from training.data.shards import (
    CUT_FILE,
    INDEX_FILES,
    META_FILE,
    META_KEYS,
    SKIPPED_FILE,
    VERSION,
    ShardSet,
    checksum,
    mask_name,
    shard_name,
)
from training.processes import end_with_parent

SHARD_BYTES = 1 << 27
"""Of a shard's ids; the document that reaches it is the last of its shard."""
BATCH_CHARACTERS = 1 << 20
SMALL_CHARACTERS = 1 << 24
"""Up to so much text is tokenised faster than other processes start."""


@dataclass(frozen=True)
class Recipe:
    """What a set is made of. conversation_tokens: for conversations, the most ids of one; None for text.

    row_tokens: of text, what validation must hold for one row; 0 where it need not. It follows from `piece_characters`.
    """

    sources: Sources
    tokenizer: Tokenizer
    validation_fraction: float
    piece_characters: int
    cut_share: float = 0.0
    conversation_tokens: int | None = None
    row_tokens: int = 0

    def key(self) -> str:
        """Changes with anything that the set depends on, though the files themselves are not read."""
        return hashlib.sha256((self.settings() + self.sources.stamp()).encode()).hexdigest()

    def settings(self) -> str:
        """Changes with anything but the files."""
        tokenizer = self.tokenizer
        parts: list[object] = [VERSION, self.validation_fraction, self.cut_share]
        parts += [tokenizer.pattern, sorted(tokenizer.special_tokens.items()), tokenizer.bos_token, tokenizer.eos_tokens]
        parts += [[rank, token.hex()] for token, rank in tokenizer.ranks.items()]
        chat = self.conversation_tokens is not None
        parts += [self.conversation_tokens, tokenizer.chat_template] if chat else [self.piece_characters]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_shards(root: Path, recipe: Recipe, num_processes: int | None = None) -> ShardSet:
    """The recipe's set in `root`, made if it is not there. num_processes: that tokenise, one per core by default.

    DataError when the sources cannot be read, hold too little to split, or the set that is there is damaged.
    """
    if recipe.conversation_tokens is not None:
        ConversationEncoder(recipe.tokenizer, recipe.conversation_tokens)  # says at once what is wrong with the template
    key = recipe.key()
    kind = "text" if recipe.conversation_tokens is None else "conversations"
    folder = root / f"{kind}{'-cuts' if recipe.cut_share > 0 else ''}-{key[:16]}"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{folder.name}.lock"):
        for remains in root.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(remains)
        if recipe.row_tokens and folder.exists() and _missing(ShardSet(folder).index(INDEX_FILES[1]), recipe) > 0:
            shutil.rmtree(folder)  # no run can have begun on it
        if not folder.exists():
            with replaced_directory(folder, lambda name: False) as temporary:
                _make(temporary, recipe, key, num_processes or usable_processors())
    shards = ShardSet(folder)
    if shards.meta["key"] != key or shards.meta["version"] != VERSION:
        raise DataError(f"{folder}: holds another set than its name says; delete the folder and start again")
    return shards


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, recipe: Recipe, key: str, num_processes: int) -> None:
    """Write the set. A limit that gives one side too little is moved, and all is done again: there cannot be much of it."""
    limit = validation_limit(recipe.validation_fraction)
    encoder = Encoder(recipe.tokenizer, limit, recipe.piece_characters, recipe.cut_share, recipe.conversation_tokens)
    while True:
        writer = _write(folder, encoder, recipe.sources, num_processes)
        entries, hashes = _without_repeats(writer)
        if len(hashes) < 2:
            names = ", ".join(recipe.sources.names)
            raise DataError(f"{names}: training and validation need two different documents, got {len(hashes)}")
        fitting = fitting_limit(encoder.limit, hashes[:, 0].tolist(), recipe.sources.names)
        if fitting == encoder.limit:
            fitting = _limit_of_a_row(fitting, entries, hashes[:, 0], recipe)
        if fitting == encoder.limit:
            break
        encoder = replace(encoder, limit=fitting)
        for path in folder.iterdir():
            path.unlink()
    for name, validates in zip(INDEX_FILES, (False, True), strict=True):
        np.save(folder / name, entries[entries["validates"] == validates])
    _finish(folder, writer, recipe, key, entries, hashes)


def _missing(entries: NDArray[Any], recipe: Recipe) -> int:
    """Tokens that validation lacks for a row; its first bos is none of them. entries: of its documents."""
    return recipe.row_tokens + 1 - int(entries["length"].sum(dtype=np.int64)) if recipe.row_tokens else 0


def _limit_of_a_row(limit: int, entries: NDArray[Any], places: NDArray[np.uint64], recipe: Recipe) -> int:
    """The limit, raised where validation does not fill a row, by as many documents as it seems to take.

    Only what validates already decides, so that sets with cuts and without are split alike. DataError when training would be
    left with nothing.
    """
    held = entries[entries["validates"] == 1]
    missing = _missing(held, recipe)
    if missing <= 0:
        return limit
    left = np.unique(places[places >= limit])
    if len(left) < 2:
        each = entries["characters"].sum() / entries["length"].sum()
        raise DataError(
            f"{', '.join(recipe.sources.names)}: too little text: to validate takes a row of {recipe.row_tokens:,} tokens, and "
            f"all documents but one lack {missing:,} for it; give some {int(missing * each) + 1:,} more characters"
        )
    count = -(-missing * len(held) // int(held["length"].sum()))
    return int(left[min(count, len(left) - 1) - 1]) + 1


def _without_repeats(writer: _Writer) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """The entries and hashes of documents that were encoded and whose text comes here for the first time."""
    entries, hashes = np.concatenate([np.empty(0, ENTRY), *writer.entries]), np.concatenate(writer.hashes or [_NO_HASHES])
    numbers = np.unique(entries["document"])
    _, first = np.unique(hashes[numbers, 1], return_index=True)
    numbers = numbers[np.sort(first)]
    return entries[np.isin(entries["document"], numbers)], hashes[numbers]


_NO_HASHES = np.empty((0, 2), np.uint64)


def _finish(folder: Path, writer: _Writer, recipe: Recipe, key: str, entries: NDArray[Any], hashes: NDArray[np.uint64]) -> None:
    """Write the table of what is there, last."""
    content = recipe.settings().encode() + hashes.tobytes() + entries["length"].tobytes() + entries["validates"].tobytes()
    meta = {
        "version": VERSION,
        "key": key,
        "fingerprint": hashlib.sha256(content).hexdigest(),
        "id_bytes": writer.dtype.itemsize,
        "conversations": recipe.conversation_tokens is not None,
        "shard_starts": writer.starts,
        "num_documents": len(hashes),
        "num_tokens": int(entries["length"].sum(dtype=np.int64)),
        "num_skipped": writer.skipped.count,
        "first_skipped": writer.skipped.first,
        "num_cut": writer.cut.count,
        "first_cut": writer.cut.first,
    }
    paths = sorted(folder.iterdir())
    for path in paths:
        sync(path)
    meta["files"] = {path.name: [path.stat().st_size, checksum(path)] for path in paths}
    assert set(meta) == META_KEYS
    write_json(folder / META_FILE, meta)


def _write(folder: Path, encoder: Encoder, sources: Sources, num_processes: int) -> _Writer:
    chat = encoder.conversation_tokens is not None
    dtype = np.dtype("<u2" if encoder.tokenizer.vocab_size <= 1 << 16 else "<u4")
    bar = tqdm(total=sources.num_bytes, desc="tokenising", unit="B", unit_scale=True, disable=None, leave=False)
    with bar, _Writer(folder, dtype, chat) as writer:
        documents = sources.documents(writer.skipped.add, advancing(bar))
        for batch in encoded_in_order(encoder, documents, num_processes):
            writer.add(batch)
    return writer


class _List:
    """Lines in a file, counted."""

    def __init__(self, file: TextIO) -> None:
        self._file, self.count, self.first = file, 0, ""

    def add(self, line: str) -> None:
        self.first = self.first or line
        self.count += 1
        self._file.write(line.encode("utf-8", "backslashreplace").decode().replace("\n", " ") + "\n")


class _Writer:
    """Appends batches to shards. Use as a context manager; then `entries` and `hashes` describe what was written."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], with_mask: bool) -> None:
        self.folder, self.dtype, self.with_mask = folder, dtype, with_mask
        self.starts: list[int] = []
        self.entries: list[NDArray[Any]] = []
        self.hashes: list[NDArray[np.uint64]] = []
        self._num_documents, self._num_tokens = 0, 0
        self._files: list[BinaryIO] = []
        self._lists = [(folder / name).open("w", encoding="utf-8") for name in (SKIPPED_FILE, CUT_FILE)]
        self.skipped, self.cut = map(_List, self._lists)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        for file in self._lists:
            file.close()

    def add(self, batch: Batch) -> None:
        """Write a batch's ids and keep its entries with their places."""
        for line in batch.skipped:
            self.skipped.add(line)
        for line in batch.cut:
            self.cut.add(line)
        entries, lengths = batch.entries.copy(), batch.entries["length"].astype(np.int64)
        ends = np.cumsum(lengths)
        entries["start"] = self._num_tokens + ends - lengths
        entries["document"] += self._num_documents
        self.entries.append(entries)
        self.hashes.append(batch.hashes)
        self._num_documents += len(batch.hashes)
        self._write(batch, ends)

    def _write(self, batch: Batch, ends: NDArray[np.int64]) -> None:
        """Fill the shard up to the first document that reaches its bound, then go on in the next."""
        written, bound = 0, SHARD_BYTES // self.dtype.itemsize
        while written < len(batch.ids):
            if not self._files:
                self._open()
            room = self.starts[-1] + bound - self._num_tokens
            end = int(ends[min(int(np.searchsorted(ends, written + room)), len(ends) - 1)])
            part = batch.ids[written:end]
            self._files[0].write(np.where(part < 0, ~part, part).astype(self.dtype).tobytes())
            if self.with_mask:
                self._files[1].write((part >= 0).tobytes())
            self._num_tokens += len(part)
            written = end
            if self._num_tokens - self.starts[-1] >= bound:
                self._close()

    def _open(self) -> None:
        number = len(self.starts)
        self.starts.append(self._num_tokens)
        names = [shard_name(number), *([mask_name(number)] if self.with_mask else [])]
        self._files = [(self.folder / name).open("wb") for name in names]

    def _close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


def encoded_in_order(encoder: Encoder, documents: Iterable[Document], num_processes: int) -> Iterator[Batch]:
    """The documents' batches in order; other processes help where there is enough text for it."""
    batches = _batches(documents)
    small = SMALL_CHARACTERS // BATCH_CHARACTERS
    if num_processes == 1:
        yield from map(encoder.encode, batches)
        return
    held = list(islice(batches, small))
    if len(held) < small:
        yield from map(encoder.encode, held)
        return
    yield from _encoded_by_many(encoder, chain(held, batches), num_processes)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded_by_many(encoder: Encoder, batches: Iterable[list[Document]], num_processes: int) -> Iterator[Batch]:
    """A few batches ahead of whoever takes them, so that no more than these are in memory."""
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Batch]] = deque()
    with ProcessPoolExecutor(num_processes, context, _begin, (encoder,)) as pool:
        try:
            for batch in batches:
                with _interrupts_blocked():
                    waiting.append(pool.submit(_encode, batch))
                if len(waiting) > 2 * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError("a process that tokenised was ended from outside; is there enough memory?") from None
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that starts in here never sees Ctrl-C, which is for the one that gave it work; there it is only late."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: Callable[[list[Document]], Batch] | None = None


def _begin(encoder: Encoder) -> None:
    """In a process that helps: keep the encoder, and end with the one that started it, however that ends."""
    global _encoder
    _encoder = encoder.encode
    end_with_parent()


def _encode(batch: list[Document]) -> Batch:
    assert _encoder is not None
    return _encoder(batch)
