"""`chunked`: memory passes only across chunk boundaries, the paper's weaker baseline (section 4).

Chunks run one after the other, the positions of each in parallel: its first position's memory is the latent of the last one
before it, all others get zeros. Keys and values of earlier chunks stay in place with their gradients. Cost: about one forward.

Shapes: B batch, T tokens, C tokens of a chunk, D hidden size, G key/value heads, H head size.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from lrt_core.attention import attention, visible
from lrt_core.config import ModelConfig
from lrt_core.kv import Heads
from lrt_core.model import LatentRecurrentTransformer
from training.schedules.losses import Losses, PassLosses, mean_of_passes, token_losses
from training.schedules.registry import check_model, schedule


@schedule(recurrent=True, fixed=True, cost=lambda chunk_len: 1.0)
def chunked(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    targets: Tensor,
    *,
    chunk_len: Annotated[int, "C, tokens of a chunk"] = 64,
) -> Losses:
    """Losses of all positions as one pass. ValueError for a model without recurrence or a chunk without a token."""
    check_model(model, "chunked")
    if chunk_len < 1:
        raise ValueError(f"chunk_len must be at least 1, got {chunk_len}")
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    kv = ChunkedKV(model.config, len(positions), recompute=model.recompute)
    memory = model.zero_memory(*tokens.shape)
    assert memory is not None
    last, hidden = memory[:, :1], []
    for start in range(0, len(positions), chunk_len):
        chunk = slice(start, start + chunk_len)
        kv.positions = positions[chunk]
        incoming = torch.cat([last, memory[:, start + 1 : start + chunk_len]], dim=1)
        out, latents = model(tokens[:, chunk], kv.positions, incoming, kv)
        last = latents[:, -1:]
        hidden.append(out)
    return mean_of_passes([PassLosses(positions, token_losses(model, torch.cat(hidden, dim=1), targets))], targets)


class ChunkedKV:
    """The keys and values [B, C, G, H] of all chunks so far, per layer; `positions` [C] are those of the chunk in hand."""

    def __init__(self, config: ModelConfig, length: int, recompute: bool = False) -> None:
        self.config, self.recompute = config, recompute
        self.positions = torch.arange(length)
        self._heads: list[list[Heads]] = [[] for _ in range(config.num_layers)]

    def attend(self, layer: int, heads: Heads) -> Tensor:
        """Append the chunk's keys and values, then attend to everything up to each query's own position."""
        held = self._heads[layer]
        held.append(heads)
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*((one.key, one.value) for one in held), strict=True))
        everything = torch.arange(keys.shape[1], device=keys.device)
        mask = visible(self.positions, everything, self.config.window(layer))
        return attention(heads.query, keys, values, mask=mask, recompute=self.recompute)
