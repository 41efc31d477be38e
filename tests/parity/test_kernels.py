"""Native kernels against their torch twins, on shapes that reach every border of a vector and of a window."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lrt_core import kernels
from lrt_core.generate import generate
from lrt_core.kernels.attention import gathered_attention, paged_attention
from lrt_core.kernels.plan import READ_AHEAD
from tests.engines import make_engine, request, run
from tests.helpers import VARIANTS, contracting_model, random_ids

needs_native = pytest.mark.skipif(not kernels.is_native(), reason="the package's build found no C++ compiler")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

SHAPES = [
    *((1, 6, 6, 128, 600), (16, 6, 6, 128, 160), (3, 4, 2, 64, 300), (2, 12, 4, 24, 77), (5, 4, 2, 8, 33), (2, 4, 1, 6, 5)),
    *((1, 16, 1, 40, 520), (1, 1, 1, 2, 1)),
]
"""Sequences, heads, KV heads, head size, longest context."""


def test_kernels_can_be_switched_off() -> None:
    before = kernels.is_native()
    with kernels.native(False):
        assert not kernels.is_native()
    assert kernels.is_native() == before


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_paged_attention(shape: tuple[int, int, int, int, int], dtype: torch.dtype, instruction_set: str) -> None:
    """By every instruction set: one row a sequence, blocks of 3 out of order; and the last rows of a context as a window, each
    bit-equal to its own."""
    num_sequences, num_heads, num_kv_heads, head_dim, context = shape
    generator = torch.Generator().manual_seed(0)
    num_blocks = -(-context // 3)
    size = num_sequences * num_blocks * 3 * num_kv_heads * head_dim
    keys, values = (
        torch.randn(size + READ_AHEAD, generator=generator).to(dtype)[:size].view(-1, num_kv_heads, head_dim) for _ in range(2)
    )
    query = 3 * torch.randn(num_sequences, num_heads, head_dim, generator=generator)
    blocks = torch.randperm(num_sequences * num_blocks, generator=generator).view(num_sequences, num_blocks)
    slots = (blocks.unsqueeze(-1) * 3 + torch.arange(3)).flatten(1)[:, :context]
    lengths = torch.randint(1, context + 1, (num_sequences,), generator=generator)
    lengths[-1] = context
    for window in (0, context // 3, context):
        columns, ends = torch.arange(context), lengths.unsqueeze(-1)
        mask = ((columns < ends) & (columns >= ends - 1 - window))[:, None, None, :]
        starts = np.arange(num_sequences + 1, dtype=np.int32)
        actual = paged_attention(query, lengths - 1, keys, values, window, 3, starts, blocks.tolist())
        whole = paged_attention(query, lengths - 1, keys, values, window, 3, starts, blocks.tolist(), is_split=False)
        assert torch.equal(actual, whole), window
        wide = gathered_attention(query, keys.float(), values.float(), slots, mask)
        assert (actual - wide).abs().max() < 1e-5, window

        num_rows = min(context, 37)
        rows = torch.randn(num_rows, num_heads, head_dim, generator=generator)
        positions, table = torch.arange(context - num_rows, context), [blocks[-1].tolist()]
        together = paged_attention(rows, positions, keys, values, window, 3, np.array([0, num_rows], dtype=np.int32), table)
        one = np.array([0, 1], dtype=np.int32)
        for row, position, result in zip(rows, positions, together, strict=True):
            alone = paged_attention(row[None], position[None], keys, values, window, 3, one, table)
            assert torch.equal(alone[0], result)


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_engine_with_and_without(variant: str) -> None:
    model = contracting_model(variant)
    prompts = [random_ids(length, seed=length) for length in (1, 7, 40, 90)]
    requests = [request(prompt, 12, logprobs=2) for prompt in prompts]
    with_native = run(make_engine(model), requests)
    with kernels.native(False):
        with_torch = run(make_engine(model), requests)
    for prompt, [fast], [plain] in zip(prompts, with_native.outcomes, with_torch.outcomes, strict=True):
        assert fast.token_ids == plain.token_ids == list(generate(model, prompt, 12))
        for own, other in zip(fast.tokens, plain.tokens, strict=True):
            assert own.logprob == pytest.approx(other.logprob, abs=1e-5)


@needs_native
@pytest.mark.parametrize("size", [1, 6, 16, 33, 768])
@pytest.mark.parametrize("source, target", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
@torch.no_grad()
def test_norm(source: str, target: str, size: int) -> None:
    source_dtype, target_dtype = getattr(torch, source), getattr(torch, target)
    for rows in (1, 3, 100):
        x = torch.randn(rows, size, generator=torch.Generator().manual_seed(size)).to(source_dtype)
        actual, wide = kernels.norm(x, target_dtype), kernels.norm_twin(x.float())
        assert actual.dtype == target_dtype
        assert (actual.float() - wide).abs().max() < TOLERANCE[target_dtype]


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens, heads, head_dim", [(1, 1, 2), (5, 3, 6), (2, 6, 128), (70, 6, 128)])
@torch.no_grad()
def test_rope_norm(dtype: torch.dtype, tokens: int, heads: int, head_dim: int) -> None:
    """From heads that lie in a wider product's rows, as fused projections leave them."""
    generator = torch.Generator().manual_seed(heads)
    product = torch.randn(tokens, heads * head_dim + 5, generator=generator).to(dtype)
    x = product[:, 3 : 3 + heads * head_dim].unflatten(-1, (heads, head_dim))
    angles = torch.rand(tokens, 1, head_dim // 2, generator=generator)
    actual = kernels.rope_norm(x, angles.cos(), angles.sin())
    wide = kernels.rope_norm_twin(x.float(), angles.cos(), angles.sin())
    assert actual.dtype == dtype and actual.is_contiguous()
    assert (actual.float() - wide).abs().max() < TOLERANCE[dtype]


def test_gradients_go_through_the_twins() -> None:
    x = torch.randn(3, 2, 8, requires_grad=True)
    angles = torch.rand(3, 1, 4)
    (kernels.norm(x).sum() + kernels.rope_norm(x, angles.cos(), angles.sin()).sum()).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
