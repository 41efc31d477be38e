"""Attention by explicit products, as a CPU trains, against the fused kernel, and its hand-written backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrt_core.attention import attention, product_attention, visible


def make_heads(dtype: torch.dtype, num_queries: int = 7, num_keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, num_queries, 4, 8), (2, num_keys, 2, 8), (2, num_keys, 2, 8))
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    return query, key, value


def make_mask(num_queries: int, num_keys: int) -> Tensor:
    keys = torch.arange(num_keys)
    return visible(keys[-num_queries:], keys, window=3)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(7, 7), (3, 7), (1, 5)])
def test_agrees_with_the_fused_kernel(num_queries: int, num_keys: int) -> None:
    heads, mask = make_heads(torch.float32, num_queries, num_keys), make_mask(num_queries, num_keys)
    with torch.no_grad():
        fused = attention(*heads, mask=mask)
    torch.testing.assert_close(product_attention(*heads, mask), fused)


def test_attention_chooses_it_for_training_and_means_the_same() -> None:
    heads = make_heads(torch.float32)
    trained = attention(*heads, causal=True)
    assert type(trained.grad_fn) is type(product_attention(*heads).grad_fn)
    with torch.no_grad():
        fused = attention(*heads, causal=True)
    assert fused.grad_fn is None
    torch.testing.assert_close(trained, fused)


@pytest.mark.parametrize("masked", [True, False])
def test_gradients(masked: bool) -> None:
    mask = make_mask(5, 7) if masked else None
    heads = make_heads(torch.float64, 5, 7)
    assert torch.autograd.gradcheck(lambda q, k, v: product_attention(q, k, v, mask), heads)


def test_autocast_computes_in_bfloat16() -> None:
    heads, mask = make_heads(torch.float32), make_mask(7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = product_attention(*heads, mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), product_attention(*heads, mask), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(part.grad is not None and part.grad.dtype == torch.float32 for part in heads)
