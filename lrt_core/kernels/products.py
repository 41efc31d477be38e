"""Products with packed weights by native code, and their torch twin. `packing.py` packs, `products.h` is the native side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt_core import kernels
from lrt_core.kernels.packing import PackedMatrix, padded


def apply(matrix: PackedMatrix, x: Tensor, softcap: float = 0.0) -> Tensor:
    """float32 x [R, k] times the matrix -> float32 [R, n]; softcap * tanh(. / softcap) of it where softcap is positive.

    Each row's result is bit-equal alone and among any others.
    """
    assert x.dtype == torch.float32 and x.ndim == 2 and x.shape[1] == matrix.k
    x = x.contiguous()
    num_rows = x.shape[0]
    out = torch.empty(num_rows, matrix.n)
    make = torch.empty if matrix.k == padded(matrix.k) else torch.zeros  # padding must be zero
    workspace = make(num_rows * (8 * padded(matrix.k) + 4), dtype=torch.uint8)
    pointers = (x.data_ptr(), num_rows, softcap, workspace.data_ptr(), out.data_ptr())
    kernels.library().lrt_apply(matrix.struct, *pointers, torch.get_num_threads())
    return out


def apply_twin(weight: Tensor, x: Tensor, softcap: float = 0.0) -> Tensor:
    """The same by torch from the plain weight [n, k], in the weight's type."""
    out = F.linear(x.to(weight.dtype), weight).float()
    return softcap * torch.tanh(out / softcap) if softcap > 0 else out
