"""How recurrent memory enters the network: shift, residual injection, KV projection and its gates (paper section 3).

Neighbours: `model.py` calls these once per layer; training schedules and `refine.py` use `shift`.

Shapes: B batch, T tokens, D hidden size, L layers, G key/value heads, H head size. A leading `...` is any batch shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrt_core.config import ModelConfig


class ProjectedMemory(NamedTuple):
    """One layer's memory in key and value space, each [..., T, G, H]."""

    key: Tensor
    value: Tensor


class ZeroMemory:
    """Zeros for every position: what a sequence's first forward is fed. `ZERO_MEMORY` is one."""


ZERO_MEMORY = ZeroMemory()
Memory = Tensor | ZeroMemory | None
"""What a forward is fed: latents [..., T, D], zeros, or None for a model without recurrence."""


class Gates(NamedTuple):
    """A layer's gates, each [..., T, G, 1] in (0, 2); None where the layer has no such input."""

    local: Tensor | None
    memory: Tensor | None
    value_embedding: Tensor | None


def shift(latents: Tensor) -> Tensor:
    """Memories of a sequence from its latents [..., T, D]: row t becomes the latent of t-1, row 0 zeros."""
    return torch.cat([torch.zeros_like(latents[..., :1, :]), latents[..., :-1, :]], dim=-2)


def split_gates(raw: Tensor | None, config: ModelConfig, layer: int) -> Gates:
    """Gates from the gate product `raw` [..., T, num_gates*G]: rows local, memory, value embedding, G each."""
    if raw is None:
        return Gates(None, None, None)
    heads = list(torch.split((2 * torch.sigmoid(raw)).unsqueeze(-1), config.num_kv_heads, dim=-2))
    local, memory = (heads.pop(0), heads.pop(0)) if config.kv_projection else (None, None)
    return Gates(local, memory, heads.pop(0) if heads else None)


def mix(local: Tensor, local_gate: Tensor | None, memory: Tensor | None, memory_gate: Tensor | None) -> Tensor:
    """g_local * local + g_mem * memory, all [..., T, G, H] and gates [..., T, G, 1]; `local` itself without memory."""
    if local_gate is None or memory is None or memory_gate is None:
        return local
    return local_gate * local + memory_gate * memory


def no_memory(x: Tensor) -> ProjectedMemory:
    """The projections of a memory of zeros: numbers without axes, which go with any shape and type, on x's device."""
    zero = x.new_zeros(())
    return ProjectedMemory(zero, zero)


class MemoryProjection(nn.Module):
    """Pk and Pv for every layer (`layerwise`) or one pair that all layers share (`shared`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.recurrence is not None
        self.config = config
        pairs = config.num_layers if config.recurrence.variant == "layerwise" else 1
        self.key = nn.ModuleList(nn.Linear(config.hidden_size, config.kv_size, bias=False) for _ in range(pairs))
        self.value = nn.ModuleList(nn.Linear(config.hidden_size, config.kv_size, bias=False) for _ in range(pairs))

    def forward(self, memory: Tensor) -> Sequence[ProjectedMemory]:
        """Memory [..., T, D] in every layer's key and value space: L entries, the same one L times when shared."""
        heads = (self.config.num_kv_heads, self.config.head_dim)
        pairs = [
            ProjectedMemory(key(memory).unflatten(-1, heads), value(memory).unflatten(-1, heads))
            for key, value in zip(self.key, self.value, strict=True)
        ]
        return pairs if len(pairs) == self.config.num_layers else pairs * self.config.num_layers
