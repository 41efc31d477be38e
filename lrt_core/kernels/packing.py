"""Weights laid out the way native code reads them. `products.h` is the reader, `plan.h` says how they lie.

bfloat16 weights are held as whole numbers of 16 bits where the processor multiplies pairs of those and not of bfloat16: one
instruction then takes twice the products of one in float32. A row of weights has a scale of its own, so that the largest come
out finer than bfloat16 has them and the smallest coarser; over normally distributed ones the error is a small part of what
bfloat16 itself has rounded away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrt_core import kernels
from lrt_core.kernels.pages import copy_to_large_pages
from lrt_core.kernels.plan import KINDS, TILE, MatrixStruct, pointer

MOST = {torch.int8: 127, torch.int16: 8191}
"""Largest weights in whole numbers; `plan.h` has the one of 16 bits too."""


def padded(size: int) -> int:
    """The next multiple of the tile."""
    return -(-size // TILE) * TILE


class PackedMatrix:
    """A weight [n, k] (float32, bfloat16, or whole numbers with a scale per output) in tiles; `struct` is what native code
    takes, in the instruction set that was in use when it was packed. quantize: to int8."""

    def __init__(self, weight: Tensor, quantize: bool = False) -> None:
        n, k = weight.shape
        scales: Tensor | None = None
        if quantize:
            weight, scales = quantize_rows(weight, torch.int8)
        elif weight.dtype == torch.bfloat16 and kernels.has_pairs():
            weight, scales = quantize_rows(weight, torch.int16)
        depth = 4 // weight.dtype.itemsize
        full = torch.zeros(padded(n), padded(k), dtype=weight.dtype)
        full[:n, :k] = weight
        tiles = full.view(padded(n) // TILE, TILE, padded(k) // depth, depth).permute(0, 2, 1, 3)
        self.data = copy_to_large_pages(tiles)
        is_int8 = weight.dtype == torch.int8
        # Native code reads an int8 number as the top byte of a 32-bit one, 2^24 times too large.
        unit = 2.0**-24 if is_int8 else 1.0
        self.scales = None if scales is None else torch.cat([scales * unit, torch.zeros(padded(n) - n)]).contiguous()
        self.n, self.k = n, k
        # Where native code multiplies bytes, those of activations count 128 too much in their upper half.
        self.offsets = -128 * full.sum(dim=1, dtype=torch.int32) if is_int8 else None
        pointers = self.data.data_ptr(), pointer(self.scales), pointer(self.offsets)
        self.struct = MatrixStruct(*pointers, n, k, KINDS[weight.dtype])

    @property
    def nbytes(self) -> int:
        """Bytes that one use of the matrix reads."""
        return self.data.nbytes + sum(part.nbytes for part in (self.scales, self.offsets) if part is not None)


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whole numbers [n, k] of that type and float32 scales [n] with weight ~ scales * numbers: symmetric, the largest of each
    row at MOST[dtype]."""
    wide, most = weight.float(), MOST[dtype]
    scales = wide.abs().amax(dim=1).clamp_min(1e-30) / most
    return torch.div(wide, scales.unsqueeze(1)).round_().clamp_(-most, most).to(dtype), scales
