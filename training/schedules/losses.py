"""What a schedule returns, and the token losses of one forward, computed in chunks so that logits never exist whole.

Shapes: B batch, T tokens, D hidden size, V vocabulary, R = B*T rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrt_core.model import LatentRecurrentTransformer

_CHUNK_ELEMENTS = 1 << 19
"""Logits per chunk: two megabytes of float32, which stay in a core's cache from the product to the gradient."""
_CHUNK_ELEMENTS_OF_A_DEVICE = 1 << 26
"""On anything but a CPU: 256 megabytes, so that products are large enough to keep it busy."""


IGNORE = -100
"""In the place of a target: this position has none."""


class PassLosses(NamedTuple):
    """One forward: the positions [T_i] it computed, and each target's loss, [B, T_i], in nats, 0 at IGNORE."""

    positions: Tensor
    token_losses: Tensor


class Losses(NamedTuple):
    """The scalar to minimise, every forward in the order in which it ran, and the forwards' shares of the total.

    shares: P numbers that sum to 1 where the total is their forwards' weighted mean, so that a batch can be split (`part_of`).
    """

    total: Tensor
    passes: list[PassLosses]
    shares: tuple[float, ...] = ()


def token_losses(model: LatentRecurrentTransformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of `model.logits`: hidden [B, T, D] and targets [B, T] -> float32 [B, T], in nats, 0 at IGNORE.

    Under autocast the head's product runs in autocast's type, like the model's own.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    weight = model.head.weight[: model.config.vocab_size].to(dtype)
    rows = hidden.flatten(0, 1).to(dtype)
    losses: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, weight, targets.flatten().clamp(min=0), model.config.logit_softcap
    )
    return losses.view(targets.shape).masked_fill(targets == IGNORE, 0.0)


def mean_of_passes(passes: list[PassLosses], targets: Tensor, weights: Sequence[float] | None = None) -> Losses:
    """Every forward's mean over its targets, of targets [B, T], weighs the same, whatever their number, or as `weights` say."""
    given = weights or [1.0] * len(passes)
    shares = tuple(weight / sum(given) for weight in given)
    return Losses(_weighted(passes, shares, count_targets(passes, targets).clamp(min=1)), passes, shares)


def count_targets(passes: list[PassLosses], targets: Tensor) -> Tensor:
    """How many of targets [B, T] each of P forwards is scored on: integers [P], on their device."""
    return torch.stack([(targets[:, one.positions] != IGNORE).sum() for one in passes])


def part_of(losses: Losses, counts: Tensor, own: Tensor) -> Tensor:
    """What the rows of `losses` give to the total of a batch that they are part of; the parts of all rows sum to it.

    counts, own: targets of each forward in the whole batch and in these rows, [P]. A schedule that names no shares is taken to
    return a mean over targets, and its total weighs by their number.
    """
    if not losses.shares:
        own_total, total = own.sum(), counts.sum().clamp(min=1)
        # Rows without a target have a mean of nothing, which is no number.
        return torch.where(own_total > 0, losses.total * (own_total / total), torch.zeros_like(losses.total))
    return _weighted(losses.passes, losses.shares, counts.clamp(min=1))


def _weighted(passes: list[PassLosses], shares: Sequence[float], counts: Tensor) -> Tensor:
    own = counts.to(passes[0].token_losses.dtype)
    means = [share * (one.token_losses.sum() / count) for one, share, count in zip(passes, shares, own, strict=True)]
    return torch.stack(means).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """-log softmax(cap tanh(h W^T / cap))[target] per row; the backward computes each chunk's logits a second time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        """hidden [R, D], weight [V, D], targets [R] -> float32 [R]."""
        losses = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        normalizers = torch.empty_like(losses)
        for rows in _chunks(hidden, weight):
            logits = _tanh(hidden[rows], weight, cap).mul_(cap)
            normalizers[rows] = logits.logsumexp(dim=-1)
            losses[rows] = normalizers[rows] - logits.gather(1, targets[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.cap = cap
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """grad [R] -> gradients of hidden and weight."""
        hidden, weight, targets, normalizers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)
        for rows in _chunks(hidden, weight):
            tanh = _tanh(hidden[rows], weight, ctx.cap)
            delta = (tanh * ctx.cap).sub_(normalizers[rows, None]).exp_()
            delta.scatter_add_(1, targets[rows, None], torch.full_like(delta[:, :1], -1.0))
            delta.mul_(grad[rows, None]).mul_(tanh.square_().neg_().add_(1.0))
            narrow = delta.to(hidden.dtype)
            grad_hidden[rows] = narrow @ weight
            grad_weight += narrow.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    elements = _CHUNK_ELEMENTS if hidden.device.type == "cpu" else _CHUNK_ELEMENTS_OF_A_DEVICE
    size = max(1, elements // len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _tanh(hidden: Tensor, weight: Tensor, cap: float) -> Tensor:
    return (hidden @ weight.T).to(_wide(hidden)).div_(cap).tanh_()


def _wide(x: Tensor) -> torch.dtype:
    """The type of losses and sums: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
