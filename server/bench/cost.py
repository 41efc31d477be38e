"""What a step of a model cannot do without: bytes to read and operations to compute; and the time the machine needs for them.

Counted from the model's real parameters before they are fused or packed. Rows of embeddings are left out: a step reads a
few rows of large tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrt_core.model import LatentRecurrentTransformer
from server.bench.limits import Limits


@dataclass(frozen=True)
class Cost:
    """weight_bytes: read once by a step of any width. layer_numbers: weights multiplied with every row; head_numbers: with the
    rows whose logits are read. kv_bytes_per_token: keys and values of all layers. attention_flops_per_key: of one query row of
    all layers, for each key it sees. above_source: the part of the layers' work that passes leave out."""

    weight_bytes: int
    layer_numbers: int
    head_numbers: int
    kv_bytes_per_token: int
    attention_flops_per_key: int
    dtype: torch.dtype
    above_source: float = 0.0

    def decode_bytes(self, num_sequences: int, context: int) -> int:
        """Bytes that a decode step reads: the weights once, each sequence's keys and values."""
        return self.weight_bytes + num_sequences * context * self.kv_bytes_per_token

    def flops(self, num_rows: float, context: float, num_logits: float) -> float:
        """Operations of a forward over rows that see `context` keys on average, some of them with logits."""
        rows = num_rows * (2 * self.layer_numbers + context * self.attention_flops_per_key)
        return rows + 2 * num_logits * self.head_numbers

    def prompt_flops(self, num_tokens: float, context: float, passes: float) -> float:
        """Operations of reading prompt tokens that see `context` keys on average, each computed `passes` times."""
        return self.flops(num_tokens * (passes - self.above_source * (passes - 1)), context, 0)

    def decode_seconds(self, limits: Limits, num_sequences: int, context: int) -> tuple[float, float]:
        """A decode step at the machine's limits: reading and computing at once, and one after the other."""
        read = self.decode_bytes(num_sequences, context) / limits.read_bandwidth
        compute = self.flops(num_sequences, context, num_sequences) / limits.gemm(self.dtype)
        return max(read, compute), read + compute

    def prompt_seconds(self, limits: Limits, num_tokens: int, passes: float, window: int) -> tuple[float, float]:
        """As `decode_seconds`, for a prompt that is read in windows, each token computed `passes` times."""
        num_steps = max(1.0, num_tokens * passes / window)
        read = num_steps * self.decode_bytes(1, num_tokens // 2) / limits.read_bandwidth
        compute = (self.prompt_flops(num_tokens, num_tokens / 2, passes) + 2 * self.head_numbers) / limits.gemm(self.dtype)
        return max(read, compute), read + compute


def cost_of(model: LatentRecurrentTransformer) -> Cost:
    """Of a model as loaded, neither fused nor packed."""
    config = model.config
    matrices = [
        weight for name, weight in model.named_parameters() if weight.ndim >= 2 and not name.endswith("embedding.weight")
    ]
    source = config.source_layer
    above = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and not name.endswith("embedding.weight") and _layer_of(name) > source
    )
    layer_numbers = sum(weight.numel() for weight in matrices) - model.head.weight.numel()
    return Cost(
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in matrices),
        layer_numbers=layer_numbers,
        head_numbers=model.head.weight.numel(),
        kv_bytes_per_token=2 * config.num_layers * config.kv_size * model.dtype.itemsize,
        attention_flops_per_key=4 * config.num_layers * config.hidden_size,
        dtype=model.dtype,
        above_source=above / layer_numbers,
    )


def _layer_of(name: str) -> int:
    """The layer that a weight belongs to, -1 for what all share."""
    return next((int(word) for word in name.split(".") if word.isdigit()), -1)
