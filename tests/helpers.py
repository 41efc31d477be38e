"""Builders that tests share: tiny models of every variant, a tokenizer, the golden cases. All run in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lrt_core.config import ModelConfig, RecurrenceConfig
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.official_tokenizer import CHAT_TEMPLATE
from lrt_core.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
RECURRENT_GOLDEN = ("lrt-layerwise", "lrt-gqa-window-refresh")
PLAIN_GOLDEN = "plain-nanochat"
GOLDEN_NAMES = (*RECURRENT_GOLDEN, PLAIN_GOLDEN)

SPECIAL_NAMES = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
MERGES = ("th", "he", "in", "er", "an", "re", "on", "at", "en", "de", "im", "po", "rt", " d", "ef", " i", "se", "lf", "  ")
TINY_VOCAB_SIZE = 256 + len(MERGES) + len(SPECIAL_NAMES)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"recurrence": None, "value_embeddings": "alternating"},
    "plain-bare": {
        "recurrence": None,
        "value_embeddings": "none",
        "use_residual_scale": False,
        "use_embedding_scale": False,
    },
    "layerwise": {},
    "shared": {"recurrence": RecurrenceConfig(2, "shared")},
    "upper-middle-source": {"recurrence": RecurrenceConfig(1, "shared")},
    "residual-only": {"recurrence": RecurrenceConfig(2, kv_projection=False)},
    "kv-only": {"recurrence": RecurrenceConfig(1, residual_injection=False), "value_embeddings": "alternating"},
    "full-heads": {"num_kv_heads": 4, "gate_channels": 0, "window_pattern": "L", "rope_dtype": "float32"},
}
"""Overrides of `tiny_config` that together reach every branch of the architecture."""


def tiny_config(**overrides: Any) -> ModelConfig:
    """3 layers of 32, 4 heads over 2 KV heads, windows of 32 and 64 tokens, layerwise recurrence from the last layer."""
    values: dict[str, Any] = {
        "vocab_size": TINY_VOCAB_SIZE,
        "sequence_len": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_size": 32,
        "window_pattern": "SL",
        "gate_channels": 16,
    }
    values.update(overrides)
    if "recurrence" not in values:
        values["recurrence"] = RecurrenceConfig(values["num_layers"] - 1)
    return ModelConfig(**values)


def tiny_model(config: ModelConfig | None = None, seed: int = 0) -> LatentRecurrentTransformer:
    """A model whose every parameter is random, so that every path shows in the logits (fresh weights zero some of them)."""
    model = LatentRecurrentTransformer(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                mean = 1.0 if name == "residual_scale" else 0.1
                weight.normal_(mean, 0.05, generator=generator)
            else:
                embeds = name.endswith("embedding.weight")
                weight.normal_(0.0, 1.0 if embeds else weight.shape[1] ** -0.5, generator=generator)
    return model.eval()


def contracting_model(variant: str = "layerwise", seed: int = 0) -> LatentRecurrentTransformer:
    """A tiny model whose recurrence is weak, as a trained one's is: refinement needs few passes."""
    model = tiny_model(tiny_config(**VARIANTS[variant]), seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "memory" in name:
                weight.mul_(0.2)
    return model


def random_ids(num_tokens: int, seed: int = 0) -> list[int]:
    """Ids of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, TINY_VOCAB_SIZE, (num_tokens,), generator=generator).tolist()
    return ids


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """Single bytes, a few pairs of letters, bos and the chat tokens: TINY_VOCAB_SIZE ids."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks.update({pair.encode(): 256 + index for index, pair in enumerate(MERGES)})
    special = {name: len(ranks) + index for index, name in enumerate(SPECIAL_NAMES)}
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
    return Tokenizer(pattern, ranks, special, "<|bos|>", ["<|assistant_end|>", "<|bos|>"], True, chat_template)


def golden_expected(name: str) -> dict[str, Tensor]:
    """What the authors' release computes for a golden case; `tests/golden/README.md` says what each tensor is."""
    return load_file(GOLDEN / name / "expected.safetensors")
