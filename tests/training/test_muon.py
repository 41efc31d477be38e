"""Muon against torch's own, against itself one matrix at a time, and what it makes of singular values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.muon import Muon, orthogonalize

SHAPES = [(16, 48), (48, 16), (16, 48), (32, 32), (16, 48), (48, 16)]


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def fill(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def trained(optimizers: list[torch.optim.Optimizer], parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    for step in range(4):
        fill(parameters, step)
        for optimizer in optimizers:
            optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def test_it_is_torchs_muon() -> None:
    """Which iterates in bfloat16: equal but for its rounding."""
    ours, theirs = weights(), weights()
    own = trained([Muon(ours, 0.03, 0.1, torch.bfloat16)], ours)
    other = trained([torch.optim.Muon(theirs, lr=0.03, weight_decay=0.1)], theirs)
    for mine, expected, start in zip(own, other, weights(), strict=True):
        assert (mine - expected).norm() < 0.02 * (expected - start).norm()


def test_matrices_of_one_shape_are_as_if_alone() -> None:
    together, alone = weights(), weights()
    whole = trained([Muon(together, 0.03, 0.1, torch.float32)], together)
    parts = trained([Muon([parameter], 0.03, 0.1, torch.float32) for parameter in alone], alone)
    for mine, expected in zip(whole, parts, strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-6, rtol=0)


def test_a_parameter_without_gradient_stays() -> None:
    parameters = weights()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = Muon(parameters, 0.03, 0.1, torch.float32)
    fill(parameters, 0)
    parameters[2].grad = None
    optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]
    assert moved == [True, True, False, True, True, True]


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)])
def test_singular_values_come_near_one_and_zeros_stay(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrices[1] = 0.0
    result = orthogonalize(matrices, torch.float32)
    assert torch.equal(result[1], matrices[1])
    torch.testing.assert_close(orthogonalize(matrices, torch.bfloat16), result, rtol=0, atol=0.03)
    values = torch.linalg.svdvals(result[[0, 2]])
    assert values.min() > 0.6 and values.max() < 1.3
