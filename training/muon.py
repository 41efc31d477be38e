"""Muon: momentum whose matrices are made orthogonal before they are applied. Neighbour: `optimizer.py`.

Keller Jordan's Muon with the constants of `torch.optim.Muon`, and three things beside: the iteration runs in a type of one's
choice, on all matrices of a shape at once, and matrices may be sharded (DTensor), in which case every rank gathers the momentum
of one matrix after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_EPS = 1e-7
MOMENTUM = 0.95
_MAX_ELEMENTS = 1 << 22
"""Of the matrices that are made orthogonal at once: 16 MiB in float32."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised in `dtype`, and decoupled weight decay.

    In bfloat16 the iteration is fastest where the hardware multiplies it; but a difference in a gradient's last bit may then
    become one of 0.4% in an update, so runs that shall agree beyond that take float32.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(list(params), {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients; a parameter without one stays as it is."""
        for group in self.param_groups:
            for batch in _batches([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._step(batch, group["lr"], group["weight_decay"])

    def _step(self, batch: list[Tensor], lr: float, weight_decay: float) -> None:
        """Apply the gradients of matrices of one shape."""
        rows, columns = batch[0].shape
        # On plain tensors, this rank's shards where the matrix is sharded: only the gathering is the ranks' business.
        gradients = [_local(_gradient(parameter)) for parameter in batch]
        weights = [_local(parameter) for parameter in batch]
        momenta = [_local(self.state[parameter]["momentum_buffer"]) for parameter in batch]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        directions = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        if _is_sharded(batch[0]):
            updates = [self._gathered(direction, parameter) for direction, parameter in zip(directions, batch, strict=True)]
        else:
            updates = list(orthogonalize(torch.stack(list(directions)), self.dtype).unbind())
        if weight_decay:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, updates, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _gathered(self, matrix: Tensor, parameter: Tensor) -> Tensor:
        """`orthogonalize` of the whole of which `matrix` is this rank's shard; the result is the shard of that."""
        group, (rows, columns) = parameter.device_mesh.get_group(), parameter.shape  # type: ignore[attr-defined]
        share, start = _share(rows, dist.get_world_size(group)), dist.get_rank(group)
        padded, whole = matrix.new_zeros(share, columns), matrix.new_empty(share * dist.get_world_size(group), columns)
        padded[: len(matrix)] = matrix
        dist.all_gather([*torch.split(whole, share)], padded, group=group)
        return orthogonalize(whole[None, :rows], self.dtype)[0, start * share :][: len(matrix)]


def _batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters, together where they have one shape, so that many small matrices cost few operations."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, alike in by_shape.items():
        count = max(1, _MAX_ELEMENTS // shape.numel())
        for start in range(0, len(alike), count):
            yield alike[start : start + count]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _share(rows: int, num_ranks: int) -> int:
    """Rows of every rank's shard but the last ones', which may have fewer or none: how torch cuts a matrix into shards."""
    return -(-rows // num_ranks)


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; that class takes seconds to import, and who has none shall not wait for it."""
    return hasattr(tensor, "to_local")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices [k, m, n], each with its singular values brought near 1, by Newton-Schulz iterations in `dtype`.

    Zeros stay zeros.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)
