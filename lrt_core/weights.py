"""The weight files of a checkpoint directory: safetensors, one file or shards with an index, mapped into memory when read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrt_core.files import CheckpointError, check_keys, read_json, sync, write_json

MAX_SHARD_BYTES = 4 * 1000**3
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Shapes = Mapping[str, tuple[int, ...]]


def is_weight_file(name: str) -> bool:
    """Whether a file of this name belongs to this module."""
    return name in (SINGLE_FILE, INDEX_FILE) or _SHARD.fullmatch(name) is not None


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shapes: Shapes, max_shard_bytes: int) -> None:
    """Write contiguous CPU tensors, in one file or, above `max_shard_bytes`, in shards with an index.

    CheckpointError names a tensor that is missing, extra, of a wrong shape or type, or not finite.
    """
    _check_names(folder, set(tensors), set(shapes))
    for name, tensor in tensors.items():
        _check_tensor(folder, name, tuple(tensor.shape), shapes[name], tensor.dtype in _DTYPES.values(), tensor.dtype)
        _check_finite(folder, name, tensor)
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file_name, shard)
        weight_map.update(dict.fromkeys(shard, file_name))
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def read_weights(folder: Path, shapes: Shapes) -> dict[str, Tensor]:
    """All tensors as stored, each a view of its mapped file.

    CheckpointError names the file and the tensor that is missing, extra, of a wrong shape or type, or not finite.
    """
    tensors: dict[str, Tensor] = {}
    for path, names in _files(folder, set(shapes)).items():
        for name, tensor in _read_file(path, names, shapes):
            _check_finite(path, name, tensor)
            tensors[name] = tensor
    return tensors


def _split(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library's own choice is unreadable to every other user, such as a server's
    sync(path)


def _files(folder: Path, names: set[str]) -> dict[Path, set[str]]:
    """Which file must hold which tensors."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not index.exists():
        return {single: names}
    if single.exists():
        raise CheckpointError(f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}; which of them counts is unclear")
    data = read_json(index)
    check_keys(index, data, {"metadata", "weight_map"})
    weight_map = data["weight_map"]
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map must be an object")
    _check_names(index, set(weight_map), names)
    files: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        # Only names of our own form: an index must not lead out of its folder.
        if not isinstance(file_name, str) or not _SHARD.fullmatch(file_name):
            raise CheckpointError(f"{index}: {name} is said to be in {file_name!r}, which is not the name of a shard")
        files.setdefault(folder / file_name, set()).add(name)
    return files


def _read_file(path: Path, names: set[str], shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: file not found")
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(path, set(file.keys()), names)
            for name in sorted(names):
                header = file.get_slice(name)
                dtype = header.get_dtype()
                _check_tensor(path, name, tuple(header.get_shape()), shapes[name], dtype in _DTYPES, dtype)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: truncated or corrupted: {error}") from None


def _check_names(path: Path, actual: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - actual), sorted(actual - expected)
    if missing:
        raise CheckpointError(f"{path}: missing tensor(s): {_some(missing)}")
    if extra:
        raise CheckpointError(f"{path}: unexpected tensor(s): {_some(extra)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_tensor(
    path: Path, name: str, shape: tuple[int, ...], expected: tuple[int, ...], allowed: bool, dtype: object
) -> None:
    if shape != expected:
        raise CheckpointError(f"{path}: tensor {name} has shape {list(shape)}, the configuration needs {list(expected)}")
    if not allowed:
        raise CheckpointError(f"{path}: tensor {name} has type {dtype}; weights are {', '.join(_DTYPES)}")


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    low, high = torch.aminmax(tensor.detach())  # one pass without a temporary; NaN propagates
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(f"{path}: tensor {name} holds a value that is not finite")
