"""Tensors of a run in a folder, whole or in the shards of any number of ranks: torch.distributed.checkpoint, made safe.

Every rank writes its shards into files of its own; whoever reads, with other shards or none, takes what it needs from all of
them. The index is a pickle by torch's format; it is opened by a reader that admits nothing but what an index consists of.
Importing this takes seconds: `state.py`, which says when a folder is complete, waits until it needs it.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from training.distributed import Ranks, ShardError

INDEX_FILE = ".metadata"


def write_tensors(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Write every rank's shards, and replicated tensors once, through to the disk. ShardError on every rank when one fails."""
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    try:
        with _unwarned():
            save(dict(tensors), storage_writer=writer, process_group=ranks.control, no_dist=ranks.control is None)
    except CheckpointException as error:
        raise ShardError(_reason(error)) from None


def read_tensors(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill `tensors` in place. ShardError on every rank when one is missing, has another shape or cannot be read."""
    reader = _Reader(folder)
    try:
        with _unwarned():
            load(dict(tensors), storage_reader=reader, process_group=ranks.control, no_dist=ranks.control is None)
    except CheckpointException as error:
        raise ShardError(_reason(error)) from None


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without torch's remark that a process on its own saves on its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _reason(error: CheckpointException) -> str:
    """What went wrong on the first rank where something did, in one line."""
    _, (cause, _) = min(error.failures.items())
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return " ".join(text.split()) or type(cause).__name__


class _Reader(FileSystemReader):
    """Reads an index without running what a pickle may hold, and tensors only: other entries would be unpickled by torch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self._folder / INDEX_FILE).open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise ValueError(f"{INDEX_FILE}: not an index of tensors")
        entries = index.state_dict_metadata
        if any(isinstance(entry, BytesStorageMetadata) for entry in entries.values()):
            raise ValueError(f"{INDEX_FILE}: holds entries that are no tensors")
        return index


_ADMITTED = {
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "uint8", "int64", "int32", "bool", "strided"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "SerializationFormat"},
    "torch.distributed.checkpoint.storage": {"StorageMeta"},
    "pathlib": {"PosixPath", "Path", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "Path", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ADMITTED.get(module, ()):
            raise pickle.UnpicklingError(f"{INDEX_FILE}: holds {module}.{name}, which is no part of an index")
        return super().find_class(module, name)
