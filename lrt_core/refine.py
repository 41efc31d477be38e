"""Parallel passes to a tolerance: a whole sequence read at once with the result of reading it token by token.

Pass j runs every position with the latents of pass j-1, shifted, as memories (pass 0: zeros). After pass j the first j+1
positions are exact; a trained recurrence contracts, so all of them come within any tolerance far sooner. The stopping rule is
the relative change of each incoming memory. `window.py` has the same rule for a window that slides over a long prompt, as
the server reads it. Source: paper section 3 (refinement); the window is this project's.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrt_core.kv import CausalKV
from lrt_core.memory import shift
from lrt_core.model import LatentRecurrentTransformer


@dataclass(frozen=True)
class Refined:
    """hidden and latents [B, T, D] of the last pass; residuals: per pass, the largest relative change of a memory."""

    hidden: Tensor
    latents: Tensor
    residuals: list[float]


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """|new - old| / |new| over the last axis in float32, [..., D] -> [...]: the residual of a latent between passes."""
    new, old = new.float(), old.float()
    difference: Tensor = torch.linalg.vector_norm(new - old, dim=-1)
    size: Tensor = torch.linalg.vector_norm(new, dim=-1)
    return difference / size.clamp_min(1e-30)


@torch.no_grad()
def refine(
    model: LatentRecurrentTransformer, tokens: Tensor, tolerance: float, max_passes: int | None = None, rounding: float = 0.0
) -> Refined:
    """Read tokens [B, T] in parallel passes until every memory changes by at most `tolerance` (or `max_passes` are done).

    T passes give the sequential result exactly, so that many always suffice. A plain model takes one pass. Changes of at most
    `rounding` that shrink no more are rounding itself, and end the passes too.
    """
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device)
    memory = model.zero_memory(*tokens.shape)
    residuals: list[float] = []
    while True:
        hidden, latents = model(tokens, positions, memory, CausalKV(model.config))
        if memory is not None:
            new_memory = shift(latents)
            change = relative_change(new_memory[:, 1:], memory[:, 1:])
            residuals.append(float(change.max()) if change.numel() else 0.0)
            memory = new_memory
        done = not residuals or residuals[-1] <= tolerance or len(residuals) >= min(length, max_passes or length)
        done = done or (residuals[-1] <= rounding and len(residuals) > 1 and residuals[-1] > 0.75 * residuals[-2])
        if done:
            return Refined(hidden, latents, residuals)
