"""Attention over contiguous keys and values, one signature for every caller; the paged form lives with its cache in `kv.py`.

Shapes: B batch, T queries, S keys, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention with scale 1/sqrt(H).

    q [B, T, N, H]; k and v [B, S, G, H] with N a multiple of G; mask is boolean, broadcastable to [B, 1, T, S], true
    where a query sees a key; `causal` is the mask of S == T without materialising it. Returns [B, T, N, H].
    """
    if _trains_on_cpu(q, k):
        if causal:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        return product_attention(q, k, v, mask)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


_MAX_PRODUCT_KEYS = 2048


def _trains_on_cpu(q: Tensor, k: Tensor) -> bool:
    """Whether explicit products pay: they hold T x S probabilities for the backward, so only up to a length."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return needs_grad and q.device.type == "cpu" and k.shape[1] <= _MAX_PRODUCT_KEYS


def product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same as explicit products and a softmax; shapes as in `attention`, mask [T, S] or None.

    On a CPU forward and backward together take less than half of the fused kernel's time: query heads that share a key head
    become rows of one product, and the backward reads the probabilities instead of computing them again.
    """
    num_rows, length, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    queries = q.unflatten(2, (num_kv_heads, group)).permute(0, 2, 3, 1, 4).reshape(-1, group * length, head_dim)
    keys = k.permute(0, 2, 3, 1).reshape(-1, head_dim, num_keys)
    values = v.transpose(1, 2).reshape(-1, num_keys, head_dim)
    bias = torch.zeros(length, num_keys, dtype=q.dtype, device=q.device)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    scores = torch.baddbmm(bias.repeat(group, 1), queries, keys, alpha=head_dim**-0.5)
    out = torch.bmm(scores.softmax(dim=-1), values).view(num_rows, num_kv_heads, group, length, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(num_rows, length, num_heads, head_dim)


def visible(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Which keys a query sees: those at distance 0..window. [..., T] and [..., S] give boolean [..., T, S]."""
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    return (distance >= 0) & (distance <= window)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of a whole sequence to itself at distances 0..window; shapes as in `attention` with S == T."""
    length = q.shape[1]
    if length - 1 <= window:
        return attention(q, k, v, causal=True)
    positions = torch.arange(length, device=q.device)
    return attention(q, k, v, mask=visible(positions, positions, window))
