"""Shift, gates, mixing and the memory projections."""

from __future__ import annotations

import pytest
import torch

from lrt_core.config import RecurrenceConfig
from lrt_core.memory import MemoryProjection, mix, shift, split_gates
from tests.helpers import tiny_config


def test_shift_moves_each_latent_to_its_successor() -> None:
    latents = torch.arange(1.0, 13.0).view(2, 3, 2)
    assert shift(latents).tolist() == [[[0, 0], [1, 2], [3, 4]], [[0, 0], [7, 8], [9, 10]]]
    assert shift(latents[:, :1]).tolist() == [[[0, 0]], [[0, 0]]]


def test_shift_passes_gradients() -> None:
    latents = torch.ones(3, 2, requires_grad=True)
    shift(latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.tolist() == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("kv_projection", "value_embeddings", "present"),
    [(True, "all", (1, 1, 1)), (True, "none", (1, 1, 0)), (False, "all", (0, 0, 1))],
)
def test_gates_in_their_order(kv_projection: bool, value_embeddings: str, present: tuple[int, int, int]) -> None:
    """Rows local, memory, value embedding; num_kv_heads (2) each; 2 sigmoid."""
    config = tiny_config(recurrence=RecurrenceConfig(2, kv_projection=kv_projection), value_embeddings=value_embeddings)
    numbers = torch.arange(1.0, 1 + 2 * sum(present))
    gates = split_gates(torch.logit(numbers / 10).view(1, -1), config, 0)
    wanted = iter(numbers.view(-1, 2).tolist())
    for gate, is_present in zip(gates, present, strict=True):
        if not is_present:
            assert gate is None
            continue
        assert gate is not None
        assert gate.shape == (1, 2, 1)
        assert gate.flatten().tolist() == pytest.approx([2 * x / 10 for x in next(wanted)])


def test_no_gate_product_means_no_gates() -> None:
    assert split_gates(None, tiny_config(), 0) == (None, None, None)


def test_mix_weighs_local_and_memory() -> None:
    local, memory = torch.full((1, 2, 3), 2.0), torch.full((1, 2, 3), 10.0)
    mixed = mix(local, torch.full((1, 2, 1), 0.5), memory, torch.tensor([[[0.0], [1.5]]]))
    assert mixed.tolist() == [[[1.0] * 3, [16.0] * 3]]
    assert mix(local, None, None, None) is local


@pytest.mark.parametrize(("variant", "num_pairs"), [("shared", 1), ("layerwise", 3)])
def test_projection_gives_every_layer_a_pair(variant: str, num_pairs: int) -> None:
    projection = MemoryProjection(tiny_config(recurrence=RecurrenceConfig(2, variant)))
    assert len(projection.key) == len(projection.value) == num_pairs
    memory = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    pairs = projection(memory)
    assert len(pairs) == 3
    for layer, pair in enumerate(pairs):
        assert pair.key.shape == pair.value.shape == (1, 4, 2, 8)
        own = layer if variant == "layerwise" else 0
        torch.testing.assert_close(pair.key.flatten(-2), memory @ projection.key[own].weight.T)
        torch.testing.assert_close(pair.value.flatten(-2), memory @ projection.value[own].weight.T)
