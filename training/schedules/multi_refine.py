"""`multi_refine`: K + 1 full forwards, each fed by the latents of the one before (paper section 4).

Cost: K + 1 forwards of the sequence. Gradients flow through all of them unless `detach` cuts them apart.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from lrt_core.kv import CausalKV
from lrt_core.memory import ZERO_MEMORY, shift
from lrt_core.model import LatentRecurrentTransformer
from training.schedules.losses import Losses, PassLosses, mean_of_passes, token_losses
from training.schedules.registry import check_model, schedule


@schedule(recurrent=True, fixed=True, cost=lambda num_refinements, loss_weights, detach: num_refinements + 1.0)
def multi_refine(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    targets: Tensor,
    *,
    num_refinements: Annotated[int, "K, the forwards after the first"] = 2,
    loss_weights: Annotated[tuple[float, ...], "weights of the K + 1 forwards' losses, equal without it"] = (),
    detach: Annotated[bool, "no gradients from one forward into the one before"] = False,
) -> Losses:
    """Losses of the K+1 forwards over all positions; the first has zero memory, each other the latents before it, shifted.

    The total is their mean, weighted by `loss_weights` where given (later-heavy ones help). ValueError for a model without
    recurrence, a K below 1 or weights that are not K + 1 numbers of at least 0 with one above.
    """
    check_model(model, "multi_refine")
    _check(num_refinements, loss_weights)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    hidden, latents = model(tokens, positions, ZERO_MEMORY, CausalKV(model.config, recompute=model.recompute))
    passes = [PassLosses(positions, token_losses(model, hidden, targets))]
    for _ in range(num_refinements):
        memory = shift(latents.detach() if detach else latents)
        hidden, latents = model(tokens, positions, memory, CausalKV(model.config, recompute=model.recompute))
        passes.append(PassLosses(positions, token_losses(model, hidden, targets)))
    return mean_of_passes(passes, targets, loss_weights or None)


def _check(num_refinements: int, loss_weights: tuple[float, ...]) -> None:
    if num_refinements < 1:
        raise ValueError(f"num_refinements must be at least 1, got {num_refinements}")
    if not loss_weights:
        return
    if len(loss_weights) != num_refinements + 1:
        raise ValueError(f"loss_weights must be {num_refinements + 1} numbers, one per forward, got {len(loss_weights)}")
    if not all(0 <= weight < math.inf for weight in loss_weights) or not any(loss_weights):
        raise ValueError(f"loss_weights must be at least 0 and not all 0, got {loss_weights}")
