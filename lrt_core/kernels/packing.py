"""Weights laid out the way native code reads them. `products.h` is the reader, `plan.h` says how they lie.

bfloat16 weights are held as whole numbers of 12 bits with a scale for every 128 of an output, where the processor multiplies
pairs of whole numbers and not of bfloat16: three quarters of the bytes to read, and one instruction takes twice the products
of one in float32. A weight moves by at most 1/4094 of the largest among its 128. For normally distributed ones that is a
quarter of what bfloat16 itself has rounded away (root mean square); where one is far above the others, about as much.
int8 weights are multiplied as bytes where the processor does that, else in such pairs, else in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lrt_core import kernels
from lrt_core.kernels.pages import copy_to_large_pages
from lrt_core.kernels.plan import INT8_PAIRS, KINDS, TILE, TWELVE_BITS, MatrixStruct, pointer

SPAN = 128
"""Weights of an output that share a scale in 12 bits."""
MOST = 2047
"""The largest of those."""
_ROWS = 1024
"""Rows of a weight that are packed at once: what is made on the way takes several times as much."""


def padded(size: int) -> int:
    """The next multiple of the tile."""
    return -(-size // TILE) * TILE


class PackedMatrix:
    """A weight [n, k] (float32 or bfloat16) in tiles; `struct` is what native code takes, in the instruction set that was in
    use when it was packed. quantize: to int8."""

    def __init__(self, weight: Tensor, quantize: bool = False) -> None:
        self.n, self.k = weight.shape
        self.scales: Tensor | None = None
        self.offsets: Tensor | None = None
        if quantize and kernels.has_pairs() and not kernels.has_bytes():
            self._pack_int8_pairs(weight)
            kind = INT8_PAIRS
        elif quantize:
            self._pack_int8(weight)
            kind = KINDS[torch.int8]
        elif weight.dtype == torch.bfloat16 and kernels.has_pairs():
            self._pack_twelve_bits(weight)
            kind = TWELVE_BITS
        else:
            self.data = copy_to_large_pages(_tiles(weight))
            kind = KINDS[weight.dtype]
        pointers = self.data.data_ptr(), pointer(self.scales), pointer(self.offsets)
        self.struct = MatrixStruct(*pointers, self.n, self.k, kind)

    def _pack_int8(self, weight: Tensor) -> None:
        numbers, scales = quantize_rows(weight)
        self.data = copy_to_large_pages(_tiles(numbers))
        # Native code reads an int8 number as the top byte of a 32-bit one, 2^24 times too large.
        self.scales = torch.cat([scales * 2.0**-24, torch.zeros(padded(self.n) - self.n)]).contiguous()
        # Where native code multiplies bytes, those of activations count 128 too much in their upper half.
        self.offsets = -128 * torch.cat(
            [numbers.sum(dim=1, dtype=torch.int32), self.scales.new_zeros(padded(self.n) - self.n).int()]
        )

    def _pack_int8_pairs(self, weight: Tensor) -> None:
        numbers, scales = quantize_rows(weight)
        full = torch.zeros(padded(self.n), padded(self.k), dtype=torch.int8)
        full[: self.n, : self.k] = numbers
        self.data = copy_to_large_pages(full.view(-1, TILE, padded(self.k) // 4, 2, 2).permute(0, 2, 3, 1, 4))
        self.scales = torch.cat([scales, torch.zeros(padded(self.n) - self.n)])

    def _pack_twelve_bits(self, weight: Tensor) -> None:
        data = torch.empty(padded(self.n) // TILE, padded(self.k) // 4, 6 * TILE, dtype=torch.uint8)
        scales = torch.empty(padded(self.n) // TILE, -(-self.k // SPAN), TILE)
        for start, part in _parts(weight):
            numbers, own_scales = quantize_spans(part)
            tiles = slice(start // TILE, (start + len(numbers)) // TILE)
            # [tiles, k / 4, two halves of two k, outputs, k of the half]
            own = numbers.view(-1, TILE, padded(self.k) // 4, 2, 2).permute(0, 2, 3, 1, 4)
            lower = own & 15
            data[tiles, :, : 4 * TILE] = (own >> 4).flatten(2).to(torch.int8).view(torch.uint8)
            data[tiles, :, 4 * TILE :] = (lower[:, :, 0] | lower[:, :, 1] << 4).flatten(2).to(torch.uint8)
            scales[tiles] = own_scales.view(-1, TILE, scales.shape[1]).transpose(1, 2)
        self.data, self.scales = copy_to_large_pages(data), scales

    @property
    def nbytes(self) -> int:
        """Bytes that one use of the matrix reads."""
        return self.data.nbytes + sum(part.nbytes for part in (self.scales, self.offsets) if part is not None)


def _tiles(weight: Tensor) -> Tensor:
    """[n, k] as [n / 16, k / depth, 16, depth], with zeros up to multiples of 16; depth numbers take four bytes."""
    n, k = weight.shape
    depth = 4 // weight.dtype.itemsize
    full = torch.zeros(padded(n), padded(k), dtype=weight.dtype)
    full[:n, :k] = weight
    return full.view(padded(n) // TILE, TILE, padded(k) // depth, depth).permute(0, 2, 1, 3)


def _parts(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some rows after the other as float32, with zeros up to multiples of 16 both ways; and where they begin."""
    n, k = weight.shape
    for start in range(0, n, _ROWS):
        rows = weight[start : start + _ROWS]
        full = torch.zeros(padded(len(rows)), padded(k))
        full[: len(rows), :k] = rows
        yield start, full


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers [n, k] and float32 scales [n] with weight ~ scales * numbers: symmetric, the largest of each row at 127."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1).clamp_min(1e-30) / 127
    return torch.div(wide, scales.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8), scales


def quantize_spans(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int16 numbers [n, k] of 12 bits and float32 scales [n, k / SPAN] (rounded up) with weight ~ scales * numbers: symmetric,
    the largest of each span at MOST."""
    n, k = weight.shape
    num_spans = -(-k // SPAN)
    spans = torch.zeros(n, num_spans * SPAN)
    spans[:, :k] = weight
    spans = spans.view(n, num_spans, SPAN)
    scales = spans.abs().amax(dim=2).clamp_min(1e-30) / MOST
    numbers = spans.div_(scales.unsqueeze(2)).round_().clamp_(-MOST, MOST).to(torch.int16)
    return numbers.view(n, -1)[:, :k].contiguous(), scales
