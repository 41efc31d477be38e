"""Muon for the matrices, AdamW for everything else, driven as one optimizer. Neighbour: `trainer.py`.

Matrices are what multiplies activations on the residual stream's scale: attention, MLP and memory projections. Embeddings,
the head, the gates' few rows and the per-layer scales have no meaningful spectrum to equalise and get AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrt_core.model import LatentRecurrentTransformer
from training.config import OptimizerConfig
from training.muon import Muon

_REFERENCE_HIDDEN_SIZE = 768
"""The width at which learning rates are stated."""

_SCALE_EPS = 1e-6
"""AdamW's epsilon for scales. Fresh layers add nothing to the stream, whose norm undoes its scale: the gradients are rounding
noise then, some 1e-9, and a smaller epsilon would make full steps of them; later they are some 1e-2."""


class Optimizer:
    """Both optimizers with one learning-rate schedule; the model's gradients are their input. The model may be sharded.

    dtype: what Muon orthogonalises in.
    """

    def __init__(self, model: LatentRecurrentTransformer, config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> None:
        groups = parameter_groups(model)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        width = (model.config.hidden_size / _REFERENCE_HIDDEN_SIZE) ** -0.5
        rates = {
            "embedding": config.embedding_lr * width,
            "head": config.head_lr * width,
            "gate": config.gate_lr * width,
            "scale": config.scale_lr,
            "residual_scale": config.scale_lr / 100,
        }
        self.muon = Muon(groups.pop("matrix"), config.matrix_lr, config.weight_decay, dtype)
        self.adamw = torch.optim.AdamW(
            [
                {"params": parameters, "lr": rates[kind], "eps": _SCALE_EPS if kind in ("scale", "residual_scale") else 1e-10}
                for kind, parameters in groups.items()
                if parameters
            ],
            betas=(0.8, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        self._begin()
        self._peaks = [[group["lr"] for group in one.param_groups] for one in (self.muon, self.adamw)]

    def _begin(self) -> None:
        """Give AdamW the state that it would make in its first step, so that `tensors` are the same ones from start to end."""
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                self.adamw.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def step(self, lr_scale: float) -> None:
        """Apply the gradients with every learning rate times `lr_scale`, then clear them."""
        for optimizer, peaks in zip((self.muon, self.adamw), self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """All that the optimizer remembers, by the weight's name and its own; filling them in place restores it."""
        return {
            f"{self._names[parameter]}.{key}": value
            for optimizer in (self.muon, self.adamw)
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }


def parameter_groups(model: LatentRecurrentTransformer) -> dict[str, list[nn.Parameter]]:
    """Every parameter in exactly one group: matrix, embedding, head, gate, scale or residual_scale."""
    groups: dict[str, list[nn.Parameter]] = {
        kind: [] for kind in ("matrix", "embedding", "head", "gate", "scale", "residual_scale")
    }
    for name, parameter in model.named_parameters():
        groups[_kind(name)].append(parameter)
    return groups


def _kind(name: str) -> str:
    if name in ("residual_scale", "embedding_scale", "memory_scale"):
        return "residual_scale" if name == "residual_scale" else "scale"
    for kind in ("embedding", "head", "gate"):
        if name.endswith(f"{kind}.weight"):
            return kind
    return "matrix"


def lr_scale(progress: float, warmup: float, warmdown: float) -> float:
    """Factor on the learning rates at `progress` 0..1 of the run: linear rise, plateau, linear fall to zero."""
    rise = progress / warmup if progress < warmup else 1.0
    fall = (1.0 - progress) / warmdown if progress > 1.0 - warmdown else 1.0
    return max(0.0, min(rise, fall))
