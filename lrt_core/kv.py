"""The only cache seam: where a forward's keys and values go, and what its queries see.

The model calls `attend(layer, heads)` once per layer and knows no more. Four places exist: `CausalKV` (a whole sequence at
once), `BufferedKV` (a subset of a sequence against everyone's latest keys and values, interleaved training), `DenseKV` (the
oracle's contiguous cache) and `PagedKV` in `paged.py` (serving).

Shapes: B batch, T tokens, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lrt_core.attention import attention, causal_attention, visible
from lrt_core.config import ModelConfig


class Heads(NamedTuple):
    """One layer's attention inputs.

    query [..., T, N, H]; key and value [..., T, G, H], as cached (key after memory, rope and norm). raw_key (before rope)
    and memory_gate [..., T, G, 1] are what re-projecting a changed memory needs (training's kv_refresh); caches ignore them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    raw_key: Tensor
    memory_gate: Tensor | None


class KV(Protocol):
    """What a forward needs of a cache."""

    def attend(self, layer: int, heads: Heads) -> Tensor:
        """Take in these tokens' keys and values, then attend; returns [..., T, N, H]."""
        ...


class CausalKV:
    """A whole sequence from position 0 on, [B, T, ...]: nothing is stored unless `record` asks for every layer's heads.

    `recompute`: attention keeps no probabilities for the backward.
    """

    def __init__(self, config: ModelConfig, record: bool = False, recompute: bool = False) -> None:
        self.config, self.recompute = config, recompute
        self.recorded: list[Heads] | None = [] if record else None

    def attend(self, layer: int, heads: Heads) -> Tensor:
        """Causal attention within the layer's window."""
        if self.recorded is not None:
            self.recorded.append(heads)
        return causal_attention(heads.query, heads.key, heads.value, self.config.window(layer), self.recompute)


class BufferedKV:
    """Every position's latest keys and values of a sequence of `length`, split by position modulo `num_subsets` (S).

    Subset i holds positions i, i+S, ... Replacing a subset replaces one tensor, so no scattered write and no copy of the
    rest is needed and gradients flow through the buffer (nothing is detached). `begin` chooses the subset whose fresh keys
    and values the next forward brings. `recompute`: attention keeps no probabilities for the backward.
    """

    def __init__(self, config: ModelConfig, recorded: list[Heads], num_subsets: int, recompute: bool = False) -> None:
        self.config, self.num_subsets, self.recompute = config, num_subsets, recompute
        self.keys = [self.split(heads.key) for heads in recorded]
        self.values = [self.split(heads.value) for heads in recorded]
        length, device = recorded[0].key.shape[1], recorded[0].key.device
        self.positions = [torch.arange(length, device=device)[i::num_subsets] for i in range(num_subsets)]
        self.subset = 0
        self._masks: dict[int, Tensor] = {}

    def split(self, x: Tensor) -> list[Tensor]:
        """[B, T, ...] -> S tensors [B, ceil((T - i) / S), ...], one per subset."""
        return [x[:, i :: self.num_subsets] for i in range(self.num_subsets)]

    def begin(self, subset: int) -> Tensor:
        """Choose the subset that the next forward computes; returns its positions [T_i]."""
        self.subset = subset
        self._masks = {}
        return self.positions[subset]

    def attend(self, layer: int, heads: Heads) -> Tensor:
        """Replace the subset's keys and values, then attend causally to the whole buffer."""
        self.keys[layer][self.subset] = heads.key
        self.values[layer][self.subset] = heads.value
        keys = torch.cat([key.to(heads.query.dtype) for key in self.keys[layer]], dim=1)
        values = torch.cat([value.to(heads.query.dtype) for value in self.values[layer]], dim=1)
        return attention(heads.query, keys, values, mask=self._mask(self.config.window(layer)), recompute=self.recompute)

    def _mask(self, window: int) -> Tensor:
        if window not in self._masks:
            self._masks[window] = visible(self.positions[self.subset], torch.cat(self.positions), window)
        return self._masks[window]


class DenseKV:
    """A contiguous cache [B, max_len, G, H] per layer; a forward's tokens start at position `length` until `advance`."""

    def __init__(self, config: ModelConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.length = config, 0
        shape = (config.num_layers, batch_size, max_len, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def attend(self, layer: int, heads: Heads) -> Tensor:
        """Write keys and values behind `length` and attend to all positions up to each query's own."""
        end = self.length + heads.key.shape[1]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} tokens, {end} are needed")
        self.keys[layer, :, self.length : end] = heads.key
        self.values[layer, :, self.length : end] = heads.value
        positions = torch.arange(end, device=heads.key.device)
        mask = visible(positions[self.length :], positions, self.config.window(layer))
        return attention(heads.query, self.keys[layer, :, :end], self.values[layer, :, :end], mask=mask)

    def advance(self, num_tokens: int) -> None:
        """Make the last forward's tokens permanent."""
        self.length += num_tokens
