"""Which weight goes to which optimizer, the rates over a run, and resuming."""

from __future__ import annotations

import pytest
import torch

from lrt_core.model import LatentRecurrentTransformer
from tests.helpers import VARIANTS, tiny_config, tiny_model
from training.config import OptimizerConfig
from training.muon import Muon
from training.optimizer import Optimizer, lr_scale, parameter_groups


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_parameter_is_in_one_group(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    groups = parameter_groups(model)
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_groups() -> None:
    model = tiny_model()
    groups = parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_kind = {kind: {names[id(parameter)] for parameter in group} for kind, group in groups.items()}
    assert by_kind["scale"] == {"embedding_scale", "memory_scale"}
    assert by_kind["residual_scale"] == {"residual_scale"}
    assert by_kind["head"] == {"head.weight"}
    assert by_kind["gate"] == {f"layers.{layer}.attention.input.gate.weight" for layer in range(3)}
    assert by_kind["embedding"] == {"embedding.weight"} | {f"layers.{n}.attention.value_embedding.weight" for n in range(3)}
    assert "memory_projection.key.0.weight" in by_kind["matrix"]
    assert "layers.2.mlp.down.weight" in by_kind["matrix"]


def fill_gradients(model: LatentRecurrentTransformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_zero_scale_moves_nothing_and_a_step_moves_everything() -> None:
    model = tiny_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = Optimizer(model, OptimizerConfig())
    fill_gradients(model, 0)
    optimizer.step(0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    fill_gradients(model, 0)
    optimizer.step(1.0)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_rates_follow_the_scale_and_the_width() -> None:
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig(matrix_lr=0.02, embedding_lr=0.2))
    fill_gradients(model, 0)
    optimizer.step(0.5)
    assert optimizer.muon.param_groups[0]["lr"] == pytest.approx(0.01)
    assert optimizer.adamw.param_groups[0]["lr"] == pytest.approx(0.1 * (32 / 768) ** -0.5)


def test_state_resumes_exactly() -> None:
    model, twin = tiny_model(), tiny_model()
    optimizer, resumed = Optimizer(model, OptimizerConfig()), Optimizer(twin, OptimizerConfig())
    for seed in range(3):
        fill_gradients(model, seed)
        optimizer.step(1.0)
    twin.load_state_dict(model.state_dict())
    for name, tensor in resumed.tensors().items():
        tensor.copy_(optimizer.tensors()[name])
    for one, other in ((model, optimizer), (twin, resumed)):
        fill_gradients(one, 9)
        other.step(0.3)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_is_torch_s_in_bfloat16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    one, other = Muon([ours], 0.1, 0.01, torch.bfloat16), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        one.step()
        other.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.6, 1.0), (0.8, 0.5), (1.0, 0.0), (1.1, 0.0)]
)
def test_lr_scale(progress: float, expected: float) -> None:
    assert lr_scale(progress, warmup=0.1, warmdown=0.4) == pytest.approx(expected)


def test_no_warmup_and_no_warmdown() -> None:
    assert [lr_scale(progress, 0.0, 0.0) for progress in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
