"""The same model with fewer, larger products, for serving: q, k, v and gates of a layer in one, all layers' memory
projections in one per step. `fuse` swaps a model's submodules in place; forward and results stay what they were (to rounding).

Neighbours: `model.py` and `memory.py` hold the plain forms, which training and checkpoints use; `packed.py` comes after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrt_core.config import ModelConfig
from lrt_core.memory import MemoryProjection, ProjectedMemory
from lrt_core.model import Attention, InputProjections, LatentRecurrentTransformer


class FusedInputProjections(nn.Module):
    """`InputProjections` as one product; gate columns beyond the gate channels are zero."""

    def __init__(self, plain: InputProjections) -> None:
        super().__init__()
        parts = [plain.query.weight, plain.key.weight, plain.value.weight]
        if plain.gate is not None:
            parts.append(F.pad(plain.gate.weight, (0, plain.query.in_features - plain.num_gate_channels)))
        self.sizes = [part.shape[0] for part in parts]
        self.has_gate = plain.gate is not None
        self.linear: nn.Module = _linear([part.detach() for part in parts])

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As `InputProjections.forward`."""
        parts = torch.split(self.linear(a), self.sizes, dim=-1)
        return parts[0], parts[1], parts[2], parts[3] if self.has_gate else None


class FusedMemoryProjection(nn.Module):
    """`MemoryProjection` as one product over all its pairs."""

    def __init__(self, plain: MemoryProjection) -> None:
        super().__init__()
        self.config: ModelConfig = plain.config
        self.num_pairs = len(plain.key)
        pairs = zip(plain.key, plain.value, strict=True)
        weights = [next(linear.parameters()).detach() for pair in pairs for linear in pair]
        self.linear: nn.Module = _linear(weights)

    def forward(self, memory: Tensor) -> Sequence[ProjectedMemory]:
        """As `MemoryProjection.forward`."""
        shape = (self.num_pairs, 2, self.config.num_kv_heads, self.config.head_dim)
        projected = self.linear(memory).reshape(*memory.shape[:-1], *shape)
        pairs = [ProjectedMemory(*pair.unbind(-3)) for pair in projected.unbind(-4)]
        return pairs if len(pairs) == self.config.num_layers else pairs * self.config.num_layers


def _linear(weights: list[Tensor]) -> nn.Linear:
    weight = torch.cat(weights)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def fuse(model: LatentRecurrentTransformer) -> LatentRecurrentTransformer:
    """Swap the model's projections for fused ones, in place; it can no longer be trained or saved. Returns the model."""
    for attention in model.modules():
        if isinstance(attention, Attention):
            assert isinstance(attention.input, InputProjections), "already fused"
            attention.input = FusedInputProjections(attention.input)
    if isinstance(model.memory_projection, MemoryProjection):
        model.memory_projection = FusedMemoryProjection(model.memory_projection)
    return model.requires_grad_(False)
