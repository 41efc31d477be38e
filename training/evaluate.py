"""Bits per byte, in parallel as trained and sequentially as served.

BPB is the sum of token losses over ln 2 times the sum of the target tokens' bytes; special tokens count in neither. The
sequential figure, true recurrence token by token, is the one that counts. Neighbours: `packing.py` supplies the rows.

Shapes: R rows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt_core.kv import DenseKV
from lrt_core.model import LatentRecurrentTransformer
from training.packing import split_rows
from training.schedules import Schedule
from training.schedules.losses import IGNORE, PassLosses


class ParallelBpb(NamedTuple):
    """passes: BPB of each of the schedule's forwards over its own positions. merged: each position scored by the last
    forward that computed it."""

    passes: list[float]
    merged: float


def bits_per_byte(token_losses: Tensor, targets: Tensor, byte_lengths: Tensor) -> float:
    """BPB of losses in nats and targets of one shape; byte_lengths [V], 0 for special tokens. ValueError without a byte.

    Where the target is IGNORE there is neither loss nor byte.
    """
    nats, total = (float(part) for part in text_sums(token_losses, targets, byte_lengths))
    if total == 0:
        raise ValueError("the targets hold no text, only special tokens")
    return nats / (math.log(2) * total)


def text_sums(token_losses: Tensor, targets: Tensor, byte_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What bits per byte divide, as sums over the targets that are text: losses in nats, and bytes; each float64 []."""
    num_bytes = byte_lengths[targets.clamp(min=0)].masked_fill(targets == IGNORE, 0)
    return token_losses.double().masked_fill(num_bytes == 0, 0.0).sum(), num_bytes.sum().double()


def merge(passes: list[PassLosses]) -> Tensor:
    """Losses [R, T] in which every position has the loss of the last forward that computed it."""
    merged = passes[0].token_losses.clone()
    for one in passes[1:]:
        merged[:, one.positions] = one.token_losses
    return merged


@torch.no_grad()
def parallel_bpb(
    model: LatentRecurrentTransformer, schedule: Schedule, rows: Tensor, byte_lengths: Tensor, batch_size: int = 8
) -> ParallelBpb:
    """BPB of rows [R, T + 1], as `split_rows` takes them, by the forwards that the schedule makes."""
    collected = [schedule(model, tokens, targets).passes for tokens, targets in _batches(rows, batch_size)]
    _, targets = split_rows(rows)
    passes = []
    for index in range(len(collected[0])):
        positions = collected[0][index].positions
        losses = torch.cat([batch[index].token_losses for batch in collected])
        passes.append(bits_per_byte(losses, targets[:, positions], byte_lengths))
    merged = torch.cat([merge(batch) for batch in collected])
    return ParallelBpb(passes, bits_per_byte(merged, targets, byte_lengths))


@torch.no_grad()
def sequential_bpb(model: LatentRecurrentTransformer, rows: Tensor, byte_lengths: Tensor, batch_size: int = 64) -> float:
    """BPB of rows [R, T + 1] decoded token by token, each token's memory the latent of the one before it."""
    return bits_per_byte(sequential_losses(model, rows, batch_size), split_rows(rows)[1], byte_lengths)


@torch.no_grad()
def sequential_losses(model: LatentRecurrentTransformer, rows: Tensor, batch_size: int = 64) -> Tensor:
    """Losses [R, T] in nats of rows [R, T + 1] decoded token by token."""
    return torch.cat([_decode_losses(model, tokens, targets) for tokens, targets in _batches(rows, batch_size)])


def _decode_losses(model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Losses [R, T] of one forward per position over a growing cache."""
    num_rows, length = tokens.shape
    cache = DenseKV(model.config, num_rows, length, model.dtype, model.device)
    memory = model.zero_memory(num_rows, 1)
    positions = torch.arange(length, device=tokens.device)
    losses = []
    for step in range(length):
        hidden, latents = model(tokens[:, step : step + 1], positions[step : step + 1], memory, cache)
        cache.advance(1)
        memory = None if memory is None else latents
        losses.append(F.cross_entropy(model.logits(hidden)[:, 0], targets[:, step], reduction="none", ignore_index=IGNORE))
    return torch.stack(losses, dim=1)


def _batches(rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(rows), batch_size):
        yield split_rows(rows[start : start + batch_size])
