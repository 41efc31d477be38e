"""The paged pool of keys, values and latents, and one step's view of it.

One address serves all three: a token slot holds the token's K and V of every layer and its outgoing latent, so whatever shares,
frees or restores a block of slots does the same to the recurrence. The memory of position t is the latent row of the slot of
t-1; `zero_row` stands for "no predecessor". Neighbours: the server's block manager hands out slots, `step.py` makes the
groups; `kv.py` describes the seam.

Shapes: T tokens of the step (all sequences flat), S sequences, C context length, N query heads, G key/value heads, H head size,
D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt_core.attention import attention
from lrt_core.config import ModelConfig
from lrt_core.kernels.attention import gathered_attention
from lrt_core.kernels.pages import advise_large_pages
from lrt_core.kernels.plan import READ_AHEAD
from lrt_core.kv import Heads
from lrt_core.model import stream_dtype


class PagedPool:
    """Storage for `num_slots` tokens: keys and values [L, num_slots, G, H] in `dtype`, latents
    [num_slots + 1, D] in at least float32, the last row zero."""

    def __init__(self, config: ModelConfig, num_slots: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.config, self.num_slots = config, num_slots
        shape = (config.num_layers, num_slots, config.num_kv_heads, config.head_dim)
        self.keys, self.values = (_zeros(shape, dtype, device) for _ in range(2))
        self.latents = torch.zeros((num_slots + 1, config.hidden_size), dtype=stream_dtype(dtype), device=device)

    @property
    def zero_row(self) -> int:
        """Row of `latents` that is never written: the memory of a token without a computed predecessor."""
        return self.num_slots

    @staticmethod
    def bytes_per_slot(config: ModelConfig, dtype: torch.dtype) -> int:
        """Memory of one token: K and V of all layers and one latent."""
        keys_and_values = 2 * config.num_layers * config.kv_size * dtype.itemsize
        return keys_and_values + config.hidden_size * stream_dtype(dtype).itemsize

    def store_latents(self, slots: Tensor, latents: Tensor) -> None:
        """Write latents [T, D] to `slots` [T]."""
        self.latents.index_copy_(0, slots, latents.to(self.latents.dtype))

    def load_memory(self, rows: Tensor) -> Tensor:
        """Memories [T, D] from latent rows [T] (`zero_row` where there is no predecessor)."""
        return self.latents.index_select(0, rows)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros with something behind them: native code reads whole vectors, past the last head's end too."""
    size = math.prod(shape)
    return advise_large_pages(torch.empty(size + READ_AHEAD, dtype=dtype, device=device)).zero_()[:size].view(shape)


@dataclass(frozen=True)
class DecodeGroup:
    """The step's sequences with one token each, first in the flat batch: S rows padded to the longest context C.

    slots [S, C] int64 (one of its own as padding), context_lens [S]: tokens each sees, its own included.
    """

    slots: Tensor
    context_lens: Tensor

    def mask(self, window: int) -> Tensor:
        """Boolean [S, 1, 1, C]: the last `window` + 1 tokens of each context."""
        columns = torch.arange(self.slots.shape[1], device=self.slots.device)
        lengths = self.context_lens.unsqueeze(-1)
        return ((columns < lengths) & (columns >= lengths - 1 - window))[:, None, None, :]


@dataclass(frozen=True)
class WindowGroup:
    """One sequence with several tokens in the step: rows start..start+T_w of the flat batch, positions up to C - 1.

    slots [C]: its whole context, the window itself included.
    """

    start: int
    num_tokens: int
    slots: Tensor

    def mask(self, window: int) -> Tensor:
        """Boolean [1, 1, T_w, C]: causal, at distances 0..window."""
        context = self.slots.shape[0]
        keys = torch.arange(context, device=self.slots.device)
        distance = keys[context - self.num_tokens :].unsqueeze(-1) - keys
        return ((distance >= 0) & (distance <= window))[None, None]


class PagedKV:
    """One step over the pool: writes the step's keys and values to `slot_mapping` [T], then every group attends."""

    def __init__(self, pool: PagedPool, slot_mapping: Tensor, decodes: DecodeGroup | None, windows: list[WindowGroup]) -> None:
        self.pool, self.slot_mapping, self.decodes, self.windows = pool, slot_mapping, decodes, windows
        self._masks: dict[int, list[Tensor]] = {}

    def attend(self, layer: int, heads: Heads) -> Tensor:
        """Take in the step's keys and values of `layer`, attend within each sequence; [T, N, H]."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys.index_copy_(0, self.slot_mapping, heads.key.to(keys.dtype))
        values.index_copy_(0, self.slot_mapping, heads.value.to(values.dtype))
        masks = self._layer_masks(self.pool.config.window(layer))
        parts = []
        if self.decodes is not None:
            slots = self.decodes.slots
            parts.append(gathered_attention(heads.query[: len(slots)], keys, values, slots, masks[0]))
        for group, mask in zip(self.windows, masks[1:], strict=True):
            query = heads.query[group.start : group.start + group.num_tokens].unsqueeze(0)
            context_keys, context_values = keys[group.slots].unsqueeze(0), values[group.slots].unsqueeze(0)
            parts.append(attention(query, context_keys, context_values, mask=mask)[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _layer_masks(self, window: int) -> list[Tensor]:
        """Masks of the decode group (an empty tensor without one) and of every window, made once per window size."""
        if window not in self._masks:
            first = self.decodes.mask(window) if self.decodes is not None else torch.empty(0)
            self._masks[window] = [first, *(group.mask(window) for group in self.windows)]
        return self._masks[window]
