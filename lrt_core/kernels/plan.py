"""The native step's structs as ctypes, and weights laid out the way it reads them. `plan.h` has the same structs in C++.

Neighbours: `step.cpp` is the native side, `lrt_core/native_model.py` fills a plan from a model.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from lrt_core.kernels.pages import copy_to_large_pages

TILE = 16
"""Outputs of one packed tile."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MOST_QUERIES = 16
"""Query heads of one key/value head that native attention takes."""
PARTIAL_SIZE = 2**21
"""Numbers for pieces of attention that wait for each other, 8 MiB; where a step needs more, no threads share a row."""
READ_AHEAD = 64
"""Numbers behind the end of the pool's keys and values that the native step may read."""


class MatrixStruct(Structure):
    """A packed weight."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("kind", c_int32),
    )


class LayerStruct(Structure):
    """One layer's weights and scales."""

    _fields_ = (
        *((name, MatrixStruct) for name in ("input", "memory", "output", "up", "down")),
        ("value_embedding", c_void_p),
        ("residual_scale", c_float),
        ("embedding_scale", c_float),
        ("memory_scale", c_float),
        ("num_gates", c_int32),
        ("window", c_int64),
    )


_SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size")


class ModelStruct(Structure):
    """The whole model."""

    _fields_ = (
        *((name, c_int64) for name in _SIZES),
        ("embedding", c_void_p),
        ("embedding_kind", c_int32),
        ("shares_memory", c_int32),
        ("memory", MatrixStruct),
        ("head", MatrixStruct),
        ("layers", POINTER(LayerStruct)),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("softcap", c_float),
        ("eps", c_float),
    )


class PoolStruct(Structure):
    """The paged pool."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("kind", c_int32),
        ("block_size", c_int32),
        ("layer_stride", c_int64),
        ("latents", c_void_p),
    )


class RowsStruct(Structure):
    """Rows of sequences that attend."""

    _fields_ = (
        *((name, c_int64) for name in ("num_rows", "num_sequences", "capacity")),
        *((name, c_void_p) for name in ("tokens", "positions", "slots", "row_starts", "table_starts", "tables", "partial")),
        ("partial_size", c_int64),
    )


class StepStruct(Structure):
    """One step's rows and sequences."""

    _fields_ = (
        *((name, c_int64) for name in ("num_rows", "num_sequences", "capacity")),
        *((name, c_void_p) for name in ("tokens", "sequences", "tables", "draws")),
        ("zero_row", c_int64),
        ("partial", c_void_p),
        ("partial_size", c_int64),
        ("tolerance", c_float),
    )


class OutcomeStruct(Structure):
    """What comes of a step."""

    _fields_ = tuple((name, c_void_p) for name in ("num_settled", "residuals", "is_finite", "hidden", "ids", "logits"))


def padded(size: int) -> int:
    """The next multiple of the tile."""
    return -(-size // TILE) * TILE


class PackedMatrix:
    """A weight [n, k] (float32, bfloat16, or int8 with a scale per output) in tiles; `struct` is what native code takes."""

    def __init__(self, weight: Tensor, quantize: bool = False) -> None:
        n, k = weight.shape
        scales: Tensor | None = None
        if quantize:
            weight, scales = quantize_rows(weight)
        depth = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}[weight.dtype]
        full = torch.zeros(padded(n), padded(k), dtype=weight.dtype)
        full[:n, :k] = weight
        tiles = full.view(padded(n) // TILE, TILE, padded(k) // depth, depth).permute(0, 2, 1, 3)
        self.data = copy_to_large_pages(tiles)
        # Native code reads an int8 number as the top byte of a 32-bit one, 2^24 times too large.
        self.scales = None if scales is None else torch.cat([scales * 2.0**-24, torch.zeros(padded(n) - n)]).contiguous()
        self.n, self.k = n, k
        # Where native code multiplies bytes, those of activations count 128 too much in their upper half.
        self.offsets = None if scales is None else -128 * full.sum(dim=1, dtype=torch.int32)
        pointers = self.data.data_ptr(), pointer(self.scales), pointer(self.offsets)
        self.struct = MatrixStruct(*pointers, n, k, KINDS[weight.dtype])

    @property
    def nbytes(self) -> int:
        """Bytes that one use of the matrix reads."""
        return self.data.nbytes + sum(part.nbytes for part in (self.scales, self.offsets) if part is not None)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, k] and float32 scales [n] with weight ~ scales * int8: symmetric, the largest of each row at 127."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1).clamp_min(1e-30) / 127
    return (wide / scales.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scales


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data, None for None."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the signatures of the native step's functions."""
    library.lrt_instruction_set.restype = library.lrt_available_set.restype = ctypes.c_char_p
    library.lrt_available_set.argtypes = library.lrt_use_set.argtypes = (c_int64,)
    library.lrt_use_set.restype = None
    library.lrt_workspace_size.restype = c_int64
    library.lrt_workspace_size.argtypes = (POINTER(ModelStruct), c_int64, c_int64)
    library.lrt_forward.argtypes = (
        *(POINTER(ModelStruct), POINTER(PoolStruct), POINTER(StepStruct)),
        *(c_int64, c_void_p, POINTER(OutcomeStruct), c_int64),
    )
    library.lrt_forward.restype = None
    library.lrt_apply.argtypes = (POINTER(MatrixStruct), c_void_p, c_int64, c_float, c_void_p, c_void_p, c_int64)
    library.lrt_apply.restype = None
    library.lrt_attend.argtypes = (
        *(POINTER(ModelStruct), POINTER(PoolStruct), POINTER(RowsStruct)),
        *(c_void_p, c_void_p, c_void_p, c_int64),
    )
    library.lrt_attend.restype = None
