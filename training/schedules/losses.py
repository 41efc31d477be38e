"""What a schedule returns, and the token losses of one forward. Shapes: B batch, T tokens, D hidden size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt_core.model import LatentRecurrentTransformer


class PassLosses(NamedTuple):
    """One forward: the positions [T_i] it computed and the loss of each target, [B, T_i], in nats."""

    positions: Tensor
    token_losses: Tensor


class Losses(NamedTuple):
    """The scalar to minimise, and every forward in the order in which it ran."""

    total: Tensor
    passes: list[PassLosses]


def token_losses(model: LatentRecurrentTransformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every target: hidden [B, T, D] and targets [B, T] -> float32 [B, T], in nats."""
    logits = model.logits(hidden)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def mean_of_passes(passes: list[PassLosses]) -> Losses:
    """Every forward weighs the same, whatever the number of its positions."""
    return Losses(torch.stack([one.token_losses.mean() for one in passes]).mean(), passes)
