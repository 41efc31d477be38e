"""Attention over a paged cache: by native code over its blocks, and by torch, which gathers. `attention.h` is the native side.

In serving the native step (`step.cpp`) runs the same native code itself; it stands here alone for tests and benchmarks.

Shapes: T rows, S sequences, C context, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrt_core import kernels
from lrt_core.attention import attention
from lrt_core.kernels.plan import KINDS, PARTIAL_SIZE, LayerStruct, ModelStruct, PoolStruct, RowsStruct

Numbers = npt.NDArray[np.int32]


def paged_attention(
    query: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    block_size: int,
    row_starts: Numbers,
    tables: list[list[int]],
    is_split: bool = True,
) -> Tensor:
    """Each row's attention to its sequence's tokens at distances 0..window -> float32 [T, N, H].

    query float32 [T, N, H]; positions int64 [T]; keys and values [slots, G, H], with `READ_AHEAD` numbers behind them; rows
    row_starts[s]..row_starts[s + 1] belong to sequence s, whose blocks are tables[s]. is_split: several threads may share
    a row's keys, which changes no bit of the result.
    """
    num_rows, num_heads, head_dim = query.shape
    layer = (LayerStruct * 1)(LayerStruct(window=window))
    model = ModelStruct(num_layers=1, num_heads=num_heads, num_kv_heads=keys.shape[1], head_dim=head_dim, layers=layer)
    pool = PoolStruct(keys.data_ptr(), values.data_ptr(), KINDS[keys.dtype], block_size, 0)
    arrays = {
        "row_starts": row_starts,
        "table_starts": np.cumsum([0, *map(len, tables[:-1])]).astype(np.int32),
        "tables": np.array([block for table in tables for block in table], dtype=np.int32),
    }
    pointers = {name: array.ctypes.data for name, array in arrays.items()}
    sizes = {"num_rows": num_rows, "num_sequences": len(tables), "capacity": num_rows}
    rows = RowsStruct(positions=positions.data_ptr(), **sizes, **pointers)
    partial = torch.empty(PARTIAL_SIZE if is_split else 0)
    rows.partial, rows.partial_size = partial.data_ptr(), len(partial)
    library, num_threads = kernels.library(), torch.get_num_threads()
    workspace = torch.zeros(library.lrt_workspace_size(ctypes.byref(model), num_rows, num_threads), dtype=torch.uint8)
    out = torch.empty(num_rows, num_heads, head_dim)
    addresses = query.contiguous().data_ptr(), workspace.data_ptr(), out.data_ptr()
    library.lrt_attend(ctypes.byref(model), ctypes.byref(pool), ctypes.byref(rows), *addresses, num_threads)
    return out


def gathered_attention(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    """One query row per sequence [S, N, H] over its slots [S, C] of keys and values [slots, G, H]; mask [S, 1, 1, C].

    The query heads of one key/value head stand as its queries: nothing is repeated.
    """
    num_sequences, _, head_dim = query.shape
    grouped = query.reshape(num_sequences, keys.shape[1], -1, head_dim).transpose(1, 2)
    out = attention(grouped, keys[slots], values[slots], mask=mask)
    return out.transpose(1, 2).flatten(1, 2)
