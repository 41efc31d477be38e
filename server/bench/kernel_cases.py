"""The native kernels that `lrt-bench kernels` measures, on the bench model's shapes: a case of each is a few lines here.

A case makes its operands anew for every copy, so that the timing (`kernels.py`) can walk through more memory than caches hold
where a model would, too.

Shapes: T tokens, S sequences, C context, N heads, H head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lrt_core import kernels
from lrt_core.kernels.attention import gathered_attention, paged_attention
from lrt_core.kernels.packing import PackedMatrix, quantize_rows
from lrt_core.kernels.plan import READ_AHEAD
from lrt_core.kernels.products import apply, apply_twin
from lrt_core.kernels.sampling import Draws, draw, draw_twin, top_logprobs, top_logprobs_twin
from server.bench.shapes import D12

WIDTHS = (1, 4, 16, 128)
"""Rows of a step: one client, some, many, a window of a prompt."""
CONTEXTS = ((1, 512), (16, 160), (16, 2048))
"""Sequences and context of attention in decoding."""


@dataclass(frozen=True)
class Operation:
    """A kernel and its twin on the same operands; bytes that a run must read, operations that it must compute."""

    native: Callable[[], object]
    twin: Callable[[], object]
    bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """One line of the table. make: fresh operands each time it is called. is_cold: operands come from memory, as weights and
    cached keys do; else they lie in the cache, as the rows of a step do, and memory is no limit to them."""

    kernel: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], Operation]
    is_cold: bool

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.kernel} {self.shape} {self.dtype}".replace("torch.", "")


def cases(dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """All cases in order of the table."""
    for dtype in dtypes:
        yield from (_norm(width, dtype) for width in WIDTHS)
        yield from (_rope_norm(width, dtype) for width in WIDTHS)
        yield from (_product(width, dtype) for width in WIDTHS)
        yield from (_paged_attention(*context, dtype) for context in CONTEXTS)
    if torch.float32 in dtypes:
        yield from (_int8_product(width) for width in WIDTHS)
        yield from (_draw(width) for width in WIDTHS[:3])
        yield from (_top_logprobs(width) for width in WIDTHS[:3])


def _product(num_rows: int, dtype: torch.dtype) -> Case:
    """The MLP's first product, [T, D] times [4D, D]."""

    def make() -> Operation:
        weight = (torch.randn(D12.intermediate_size, D12.hidden_size) * D12.hidden_size**-0.5).to(dtype)
        x, matrix = torch.randn(num_rows, D12.hidden_size), PackedMatrix(weight)
        flops = 2 * num_rows * weight.numel()
        return Operation(lambda: apply(matrix, x), lambda: apply_twin(weight, x), matrix.nbytes, flops)

    return Case("product", f"[{num_rows}, {D12.hidden_size}] x {D12.intermediate_size}", dtype, make, is_cold=True)


def _int8_product(num_rows: int) -> Case:
    """The same with int8 weights; its twin multiplies by the rounded ones in float32."""

    def make() -> Operation:
        weight = torch.randn(D12.intermediate_size, D12.hidden_size) * D12.hidden_size**-0.5
        numbers, scales = quantize_rows(weight)
        x, matrix, rounded = (
            torch.randn(num_rows, D12.hidden_size),
            PackedMatrix(weight, quantize=True),
            numbers * scales[:, None],
        )
        flops = 2 * num_rows * weight.numel()
        return Operation(lambda: apply(matrix, x), lambda: apply_twin(rounded, x), matrix.nbytes, flops)

    return Case("int8 product", f"[{num_rows}, {D12.hidden_size}] x {D12.intermediate_size}", torch.float32, make, is_cold=True)


def _draw(num_rows: int) -> Case:
    """A token from each row of logits [R, V], at temperature 1 and top_p 0.9."""

    def make() -> Operation:
        logits = 3 * torch.randn(num_rows, D12.vocab_size)
        ones, zeros = [1.0] * num_rows, [0.0] * num_rows
        draws = Draws(ones, [0] * num_rows, [0.9] * num_rows, zeros, [0.5] * num_rows)
        return Operation(lambda: draw(logits, draws), lambda: draw_twin(logits, draws), logits.nbytes, 4 * logits.numel())

    return Case("draw", f"[{num_rows}, {D12.vocab_size}]", torch.float32, make, is_cold=False)


def _top_logprobs(num_rows: int) -> Case:
    """Of one id and the 5 likeliest of each row of logits [R, V]."""

    def make() -> Operation:
        logits, ids = 3 * torch.randn(num_rows, D12.vocab_size), torch.zeros(num_rows, dtype=torch.int64)
        operands = (logits, ids, 5)
        return Operation(
            lambda: top_logprobs(*operands)[1], lambda: top_logprobs_twin(*operands)[1], logits.nbytes, 3 * logits.numel()
        )

    return Case("top_logprobs", f"[{num_rows}, {D12.vocab_size}]", torch.float32, make, is_cold=False)


def _norm(num_tokens: int, dtype: torch.dtype) -> Case:
    """The residual stream, float32 [T, D], to the type of the products."""

    def make() -> Operation:
        x = torch.randn(num_tokens, D12.hidden_size)
        num_bytes = x.numel() * (x.element_size() + dtype.itemsize)
        return Operation(lambda: kernels.norm(x, dtype), lambda: kernels.norm_twin(x).to(dtype), num_bytes, 4 * x.numel())

    return Case("norm", f"[{num_tokens}, {D12.hidden_size}]", dtype, make, is_cold=False)


def _rope_norm(num_tokens: int, dtype: torch.dtype) -> Case:
    """Queries [T, N, H]."""
    num_heads, head_dim = D12.num_heads, D12.head_dim

    def make() -> Operation:
        x = torch.randn(num_tokens, num_heads, head_dim).to(dtype)
        angles = torch.rand(num_tokens, 1, head_dim // 2)
        operands = (x, angles.cos(), angles.sin())
        num_bytes = 2 * x.nbytes + 2 * angles.nbytes
        return Operation(
            lambda: kernels.rope_norm(*operands), lambda: kernels.rope_norm_twin(*operands), num_bytes, 7 * x.numel()
        )

    return Case("rope_norm", f"[{num_tokens}, {num_heads}, {head_dim}]", dtype, make, is_cold=False)


def _paged_attention(num_sequences: int, context: int, dtype: torch.dtype) -> Case:
    """One query row [S, N, H] each over C slots that lie anywhere in a pool, in blocks of 16."""
    num_heads, num_kv_heads, head_dim = D12.num_heads, D12.num_kv_heads, D12.head_dim

    def make() -> Operation:
        num_slots, num_blocks = num_sequences * context, context // 16
        size = num_slots * num_kv_heads * head_dim
        keys, values = (
            torch.randn(size + READ_AHEAD).to(dtype)[:size].view(num_slots, num_kv_heads, head_dim) for _ in range(2)
        )
        query = torch.randn(num_sequences, num_heads, head_dim)
        blocks = torch.randperm(num_slots // 16).view(num_sequences, num_blocks)
        slots = (blocks.unsqueeze(-1) * 16 + torch.arange(16)).reshape(num_sequences, context)
        positions, mask = torch.full((num_sequences,), context - 1), torch.ones(num_sequences, 1, 1, context, dtype=torch.bool)
        starts, tables = np.arange(num_sequences + 1, dtype=np.int32), blocks.tolist()
        return Operation(
            lambda: paged_attention(query, positions, keys, values, context, 16, starts, tables),
            lambda: gathered_attention(query.to(dtype), keys, values, slots, mask).float(),
            keys.nbytes + values.nbytes + 2 * query.nbytes,
            4 * num_slots * num_heads * head_dim,
        )

    return Case("paged_attention", f"S={num_sequences} C={context}", dtype, make, is_cold=True)
