"""The native step's structs as ctypes. `plan.h` has the same in C++.

Neighbours: `step.cpp` is the native side, `packing.py` lays weights out, `lrt_core/native_model.py` fills a plan from a model.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

TILE = 16
"""Outputs of one packed tile."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
TWELVE_BITS = 3
"""Whole numbers of 12 bits, for which torch has no type."""
INT8_PAIRS = 4
"""int8 where pairs of numbers of 16 bits are multiplied and bytes are not."""

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


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data, None for None."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the signatures of the native step's functions."""
    library.lrt_instruction_set.restype = library.lrt_available_set.restype = ctypes.c_char_p
    library.lrt_available_set.argtypes = library.lrt_use_set.argtypes = (c_int64,)
    library.lrt_use_set.restype = None
    library.lrt_has_pairs.restype, library.lrt_has_pairs.argtypes = c_int32, ()
    library.lrt_has_bytes.restype, library.lrt_has_bytes.argtypes = c_int32, ()
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
