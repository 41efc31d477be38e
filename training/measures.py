"""What `lrt-eval` measures of a model on rows of text: true recurrence in few passes, losses by position, gates.

Neighbours: `evaluate.py` has bits per byte, `probes.py` the synthetic tasks, `evaluation.py` the command.

Shapes: R rows, T tokens, L layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt_core.kv import CausalKV, Heads
from lrt_core.memory import shift, split_gates
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.refine import refine
from lrt_core.tokenizer import Tokenizer
from training.schedules.losses import token_losses

ROUNDING = 1e-5
"""Residuals below it hold the rounding of float32: of the recurrence they tell nothing, and they may shrink no further."""


class Refinement(NamedTuple):
    """losses: of every target under the true recurrence, [R, T], in nats. residuals: per pass, the largest relative change of a
    memory in any row. settled: whether all rows came within the tolerance, or to rounding."""

    losses: Tensor
    residuals: list[float]
    settled: bool


@torch.no_grad()
def refined_losses(
    model: LatentRecurrentTransformer, rows: Tensor, tolerance: float, max_passes: int, batch_size: int = 8
) -> Refinement:
    """Losses of rows [R, T + 1] after parallel passes to a tolerance: what decoding token by token gives, to rounding."""
    losses, residuals, settled = [], list[float](), True
    for batch in torch.split(rows, batch_size):
        result = refine(model, batch[:, :-1], tolerance, max_passes, ROUNDING)
        losses.append(token_losses(model, result.hidden, batch[:, 1:]))
        residuals += [0.0] * (len(result.residuals) - len(residuals))
        for index, residual in enumerate(result.residuals):
            residuals[index] = max(residuals[index], residual)
        exact = len(result.residuals) >= batch.shape[1] - 1
        settled = settled and (exact or not result.residuals or result.residuals[-1] <= max(tolerance, ROUNDING))
    return Refinement(torch.cat(losses), residuals, settled)


def contraction(residuals: list[float]) -> float | None:
    """What a pass leaves of the error, by geometric mean over the passes above rounding; None with fewer than two of them."""
    count = next((index for index, residual in enumerate(residuals) if residual < ROUNDING), len(residuals))
    return (residuals[count - 1] / residuals[0]) ** (1 / (count - 1)) if count > 1 else None


def pack_rows(texts: Iterator[str] | list[str], tokenizer: Tokenizer, sequence_len: int, num_rows: int) -> Tensor:
    """At most num_rows rows [R, T + 1] at even distances of the texts' stream, each opening with bos, if the tokenizer has one.

    ValueError when there is not one full row.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    rows: list[list[int]] = []
    row: list[int] = list(bos)
    for text in texts:
        ids = ([] if row == bos else bos) + tokenizer.encode(text, add_bos=False)
        while ids:
            room = sequence_len + 1 - len(row)
            row, ids = row + ids[:room], ids[room:]
            if len(row) == sequence_len + 1:
                rows.append(row)
                row = list(bos)
    if not rows:
        raise ValueError(f"the text has no full row of {sequence_len} tokens; give more, or a smaller --sequence-len")
    count = min(num_rows, len(rows))
    return torch.tensor([rows[index * len(rows) // count] for index in range(count)])


class Bucket(NamedTuple):
    """Positions start..end-1 of a row, and their mean loss in nats per token."""

    start: int
    end: int
    loss: float


def position_buckets(losses: Tensor) -> list[Bucket]:
    """Losses [R, T] by position, in buckets that double."""
    length, start, buckets = losses.shape[1], 0, []
    while start < length:
        end = min(length, max(1, 2 * start))
        buckets.append(Bucket(start, end, float(losses[:, start:end].double().mean())))
        start = end
    return buckets


def late_minus_early(losses: Tensor) -> dict[str, float]:
    """Mean losses [R, T] of the first and of the last quarter of the positions, and the second less the first."""
    quarter = max(1, losses.shape[1] // 4)
    early, late = (float(part.double().mean()) for part in (losses[:, :quarter], losses[:, -quarter:]))
    return {"early": early, "late": late, "late_minus_early": late - early}


@dataclass
class _Recorder:
    """A causal cache that keeps every layer's heads, and the raw gates that hooks on the input projections see."""

    kv: CausalKV
    raw_gates: dict[int, Tensor | None]

    @property
    def heads(self) -> list[Heads]:
        assert self.kv.recorded is not None
        return self.kv.recorded


@torch.no_grad()
def layer_diagnostics(model: LatentRecurrentTransformer, rows: Tensor, tolerance: float) -> list[dict[str, Any]]:
    """For every layer: its scales, mean and deviation of its gates, and the share of memory in keys and values.

    residual_scale, embedding_scale and memory_scale are alpha, beta and gamma. key_memory and value_memory: RMS of what
    memory adds over the RMS of the whole, before rope and norm. Where a layer has no such part, the key is missing.
    """
    tokens = rows[:, :-1]
    memory = None
    if model.config.recurrence is not None:
        memory = shift(refine(model, tokens, tolerance, rounding=ROUNDING).latents)
    record = _recorded_forward(model, tokens, memory)
    projected = model.memory_projection(memory) if model.memory_projection is not None else None
    results: list[dict[str, Any]] = []
    for layer, heads in enumerate(record.heads):
        row: dict[str, Any] = {"layer": layer, **_scales(model, layer), **_gates(model, record.raw_gates[layer], layer)}
        if projected is not None and heads.memory_gate is not None:
            row["key_memory"] = _rms(heads.memory_gate * projected[layer].key) / _rms(heads.raw_key)
            row["value_memory"] = _rms(heads.memory_gate * projected[layer].value) / _rms(heads.value)
        results.append(row)
    return results


def _recorded_forward(model: LatentRecurrentTransformer, tokens: Tensor, memory: Tensor | None) -> _Recorder:
    record = _Recorder(CausalKV(model.config, record=True), {})
    handles = []
    for index, layer in enumerate(model.layers):

        def keep(module: object, inputs: object, output: tuple[Any, ...], index: int = index) -> None:
            record.raw_gates[index] = output[3]

        handles.append(layer.get_submodule("attention.input").register_forward_hook(keep))
    try:
        model(tokens, torch.arange(tokens.shape[1], device=tokens.device), memory, record.kv)
    finally:
        for handle in handles:
            handle.remove()
    return record


def _scales(model: LatentRecurrentTransformer, layer: int) -> dict[str, float]:
    scales = {name: getattr(model, name) for name in ("residual_scale", "embedding_scale", "memory_scale")}
    return {name: float(scale[layer]) for name, scale in scales.items() if scale is not None}


def _gates(model: LatentRecurrentTransformer, raw: Tensor | None, layer: int) -> dict[str, dict[str, float]]:
    gates = split_gates(raw, model.config, layer)._asdict()
    found = {name: gate.double() for name, gate in gates.items() if gate is not None}
    return {f"gate_{name}": {"mean": float(gate.mean()), "std": float(gate.std())} for name, gate in found.items()}


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
