"""The bench model's shape and its variants. No torch."""

from __future__ import annotations

from lrt_core.config import ModelConfig, Variant

D12_NAME = "d12"
D12 = ModelConfig(
    vocab_size=32768, sequence_len=2048, num_layers=12, num_heads=6, num_kv_heads=6, hidden_size=768, gate_channels=32
)
VARIANTS: dict[str, Variant | None] = {"layerwise": "layerwise", "shared": "shared", "plain": None}
"""Recurrence by the name that `--variant` takes."""
