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
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


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
