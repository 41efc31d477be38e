"""Muon: momentum whose matrices are made orthogonal before they are applied. Neighbour: `optimizer.py`.

Keller Jordan's Muon with the constants of `torch.optim.Muon`, and two things beside: the iteration runs in a type of one's
choice, and matrices may be sharded (DTensor), in which case every rank gathers the momentum of one matrix after the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_EPS = 1e-7
MOMENTUM = 0.95


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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                # On plain tensors, this rank's shards where the matrix is sharded: only the gathering is the ranks' business.
                gradient, weight = _local(parameter.grad), _local(parameter)
                momentum = _local(self.state[parameter]["momentum_buffer"])
                momentum.lerp_(gradient, 1 - MOMENTUM)
                update = self._orthogonalized(gradient.lerp(momentum, MOMENTUM), parameter)
                rows, columns = parameter.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _orthogonalized(self, matrix: Tensor, parameter: Tensor) -> Tensor:
        """`orthogonalize` of a matrix, or of the shard of one that lies as `parameter` does; the result lies so too."""
        if not _is_sharded(parameter):
            return orthogonalize(matrix, self.dtype)
        group, (rows, columns) = parameter.device_mesh.get_group(), parameter.shape  # type: ignore[attr-defined]
        share, start = _share(rows, dist.get_world_size(group)), dist.get_rank(group)
        padded, whole = matrix.new_zeros(share, columns), matrix.new_empty(share * dist.get_world_size(group), columns)
        padded[: len(matrix)] = matrix
        dist.all_gather(list(torch.split(whole, share)), padded, group=group)
        return orthogonalize(whole[:rows], self.dtype)[start * share :][: len(matrix)]


def _share(rows: int, num_ranks: int) -> int:
    """Rows of every rank's shard but the last ones', which may have fewer or none: how torch cuts a matrix into shards."""
    return -(-rows // num_ranks)


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; that class takes seconds to import, and who has none shall not wait for it."""
    return hasattr(tensor, "to_local")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix [m, n] with its singular values brought near 1, by Newton-Schulz iterations in `dtype`; zeros stay zeros."""
    a, b, c = _COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)
