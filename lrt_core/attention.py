"""Attention over contiguous keys and values, one signature for every caller; the paged form is in `paged.py` and `kernels`.

Shapes: B batch, T queries, S keys, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, recompute: bool = False
) -> Tensor:
    """Softmax attention with scale 1/sqrt(H).

    q [B, T, N, H]; k and v [B, S, G, H] with N a multiple of G; mask is boolean, broadcastable to [B, 1, T, S], true
    where a query sees a key; `causal` is the mask of S == T without materialising it. `recompute` keeps no probabilities
    for the backward, at the cost of time. Returns [B, T, N, H].
    """
    if not recompute and _trains_on_cpu(q, k):
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

    On a CPU forward and backward together take half of the fused kernel's time: query heads that share a key head become rows
    of one product, one row of the batch and one key head at a time stays in a core's cache, and the backward reads the
    probabilities instead of computing them again. Under autocast the products run in autocast's type.
    """
    device, group = q.device.type, q.shape[2] // k.shape[2]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    bias = torch.zeros(q.shape[1], k.shape[1], dtype=dtype, device=q.device)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    queries = torch.unflatten(q.to(dtype), 2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)
    keys = k.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)
    values = v.to(dtype).transpose(1, 2).flatten(0, 1)
    out: Tensor = _ProductAttention.apply(queries, keys, values, bias.repeat(group, 1))  # type: ignore[no-untyped-call]
    heads = torch.unflatten(torch.unflatten(out, 0, k.shape[::2]), 2, (group, -1))
    return heads.permute(0, 3, 1, 2, 4).flatten(2, 3)


class _ProductAttention(torch.autograd.Function):
    """softmax(q k / sqrt(H) + bias) v for q [P, R, H], k [P, H, S], v [P, S, H], bias [R, S], one p in 0..P-1 at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Returns [P, R, H]."""
        ctx.scale = q.shape[-1] ** -0.5
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        probabilities = q.new_empty(len(q), *bias.shape)
        for p in range(len(q)):
            torch.softmax(torch.addmm(bias, q[p], k[p], alpha=ctx.scale), dim=-1, out=probabilities[p])
            torch.mm(probabilities[p], v[p], out=out[p])
        ctx.save_for_backward(q, k, v, probabilities, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """grad [P, R, H] -> gradients of q, k and v."""
        q, k, v, probabilities, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        grad = grad.contiguous()
        mean = (grad * out).sum(dim=-1, keepdim=True)
        for p in range(len(q)):
            torch.mm(probabilities[p].T, grad[p], out=grad_v[p])
            grad_scores = torch.mm(grad[p], v[p].T).sub_(mean[p]).mul_(probabilities[p]).mul_(ctx.scale)
            torch.mm(grad_scores, k[p].T, out=grad_q[p])
            torch.mm(q[p].T, grad_scores, out=grad_k[p])
        return grad_q, grad_k, grad_v, None


def visible(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Which keys a query sees: those at distance 0..window. [..., T] and [..., S] give boolean [..., T, S]."""
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    return (distance >= 0) & (distance <= window)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int, recompute: bool = False) -> Tensor:
    """Attention of a whole sequence to itself at distances 0..window; shapes as in `attention` with S == T."""
    length = q.shape[1]
    if length - 1 <= window:
        return attention(q, k, v, causal=True, recompute=recompute)
    positions = torch.arange(length, device=q.device)
    return attention(q, k, v, mask=visible(positions, positions, window), recompute=recompute)
