"""What a step of a model cannot do without: bytes to read and operations to compute; and the time the machine needs for them.

Counted from the model's real parameters before they are fused or packed, but for the bytes where native code serves: those are
of what it reads. Rows of embeddings are left out: a step reads a few rows of large tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrt_core.model import LatentRecurrentTransformer
from server.bench.limits import Limits


@dataclass(frozen=True)
class Cost:
    """weight_bytes: read once by a step of any width. layer_numbers: weights multiplied with every row; head_numbers: with the
    rows whose logits are read. kv_bytes_per_key, attention_flops_per_key: of one layer, for each key that a query row sees.
    spans: how many keys a row sees at most, by layer. above_source: the part of the layers' work that passes leave out."""

    weight_bytes: int
    layer_numbers: int
    head_numbers: int
    kv_bytes_per_key: int
    attention_flops_per_key: int
    spans: tuple[int, ...]
    dtype: torch.dtype
    above_source: float = 0.0

    def keys_seen(self, context: int) -> int:
        """Keys that a row sees in all layers together when `context` of them are there, its own among them."""
        return sum(min(context, span) for span in self.spans)

    def mean_keys_seen(self, num_tokens: int) -> float:
        """As `keys_seen`, on average over a prompt's rows."""
        seen = 0.0
        for span in self.spans:
            short = min(num_tokens, span)  # rows that see all before them: 1 + 2 + ... + short keys
            seen += short * (short + 1) / 2 + (num_tokens - short) * span
        return seen / num_tokens

    def decode_bytes(self, num_sequences: int, keys: float) -> float:
        """Bytes that a decode step reads: the weights once, the keys and values that each sequence's row sees."""
        return self.weight_bytes + num_sequences * keys * self.kv_bytes_per_key

    def flops(self, num_rows: float, keys: float, num_logits: float) -> float:
        """Operations of a forward over rows that see so many keys in all layers together, some of them with logits."""
        rows = num_rows * (2 * self.layer_numbers + keys * self.attention_flops_per_key)
        return rows + 2 * num_logits * self.head_numbers

    def prompt_flops(self, num_tokens: int, passes: float) -> float:
        """Operations of reading a prompt, each of its tokens computed `passes` times."""
        return self.flops(num_tokens * (passes - self.above_source * (passes - 1)), self.mean_keys_seen(num_tokens), 0)

    def decode_seconds(self, limits: Limits, num_sequences: int, context: int) -> tuple[float, float]:
        """A decode step at the machine's limits: reading and computing at once, and one after the other."""
        keys = self.keys_seen(context)
        read = self.decode_bytes(num_sequences, keys) / limits.read_bandwidth
        compute = self.flops(num_sequences, keys, num_sequences) / limits.gemm(self.dtype)
        return max(read, compute), read + compute

    def prompt_seconds(self, limits: Limits, num_tokens: int, passes: float, window: int) -> tuple[float, float]:
        """As `decode_seconds`, for a prompt that is read in windows, each token computed `passes` times."""
        num_steps = max(1.0, num_tokens * passes / window)
        read = num_steps * self.decode_bytes(1, self.mean_keys_seen(num_tokens)) / limits.read_bandwidth
        compute = (self.prompt_flops(num_tokens, passes) + 2 * self.head_numbers) / limits.gemm(self.dtype)
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
        kv_bytes_per_key=2 * config.kv_size * model.dtype.itemsize,
        attention_flops_per_key=4 * config.hidden_size,
        spans=tuple(config.window(layer) + 1 for layer in range(config.num_layers)),
        dtype=model.dtype,
        above_source=above / layer_numbers,
    )


def _layer_of(name: str) -> int:
    """The layer that a weight belongs to, -1 for what all share."""
    return next((int(word) for word in name.split(".") if word.isdigit()), -1)
