"""`baseline`: one forward, recurrence off."""

from __future__ import annotations

import torch
from torch import Tensor

from lrt_core.kv import CausalKV
from lrt_core.model import LatentRecurrentTransformer
from training.schedules.losses import Losses, PassLosses, mean_of_passes, token_losses
from training.schedules.registry import check_model, schedule


@schedule(recurrent=False, fixed=True, cost=lambda: 1.0)
def baseline(model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor) -> Losses:
    """Losses of the plain backbone; a recurrent model is a ValueError (it would train on zero memories alone)."""
    check_model(model, "baseline")
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    hidden, _ = model(tokens, positions, None, CausalKV(model.config, recompute=model.recompute))
    return mean_of_passes([PassLosses(positions, token_losses(model, hidden, targets))], targets)
