"""Weights to start with: a checkpoint's, of the same architecture or of a plain model that becomes a recurrent one.

An upgraded model computes at first what the plain one did: memory enters with weight zero (scales and projections), local
keys and values keep the weight one (a gate's row of zeros is 2 sigmoid(0) = 1), value embeddings that are new are zeros.
Gradients reach all of these from the first step on. Neighbours: `__main__.py` (--init-from), `lrt_core/checkpoint.py`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from lrt_core.checkpoint import CheckpointError, load_config, load_tensors
from lrt_core.config import ModelConfig
from lrt_core.model import LatentRecurrentTransformer


def check_fits(directory: Path, source: ModelConfig, target: ModelConfig) -> None:
    """CheckpointError unless weights of `source` can start a model of `target`: alike but for a recurrence that is new.

    A recurrent model may also have value embeddings in more layers than the plain one that it grows from.
    """
    upgrade = source.recurrence is None and target.recurrence is not None
    for one in fields(ModelConfig):
        theirs, ours = getattr(source, one.name), getattr(target, one.name)
        grows = one.name == "recurrence" or (one.name == "value_embeddings" and _covers(source, target))
        if theirs != ours and not (upgrade and grows):
            raise CheckpointError(f"{directory}: {one.name} is {theirs} there and {ours} in the model to train")


def _covers(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether the target has a value embedding wherever the source has one."""
    return all(target.has_value_embedding(i) or not source.has_value_embedding(i) for i in range(source.num_layers))


@torch.no_grad()
def initialize(model: LatentRecurrentTransformer, directory: Path) -> None:
    """Give the model the checkpoint's weights, and neutral ones where it has parts that the checkpoint lacks.

    CheckpointError names what does not fit.
    """
    source, target = load_config(directory), model.config
    check_fits(directory, source, target)
    tensors = load_tensors(directory)
    for name, weight in model.named_parameters():
        if name.endswith("attention.input.gate.weight"):
            weight.copy_(_gate(source, target, int(name.split(".")[1]), weight, tensors.get(name)))
        elif name in tensors:
            weight.copy_(tensors[name])
        else:
            weight.zero_()


def _gate(source: ModelConfig, target: ModelConfig, layer: int, weight: Tensor, old: Tensor | None) -> Tensor:
    """A layer's gate rows: zeros (so gates of one) but for the checkpoint's, of the value embedding, which are the last."""
    new = torch.zeros_like(weight)
    if old is None:
        return new
    num_new = (target.num_gates(layer) - source.num_gates(layer)) * target.num_kv_heads
    new[num_new:] = old
    return new
