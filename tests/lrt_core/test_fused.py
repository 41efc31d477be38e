"""Fused projections part by part; `tests/parity/test_fused.py` compares whole models."""

from __future__ import annotations

import copy

import pytest
import torch

from lrt_core.fused import FusedInputProjections, FusedMemoryProjection, fuse
from lrt_core.model import InputProjections
from tests.helpers import VARIANTS, tiny_config, tiny_model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
@torch.no_grad()
def test_every_part_is_what_it_was(variant: str, shape: tuple[int, ...]) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    a = torch.randn(*shape, 32, generator=torch.Generator().manual_seed(0))
    for layer in model.layers:
        plain = layer.attention.input
        for expected, actual in zip(plain(a), FusedInputProjections(plain)(a), strict=True):
            assert (expected is None) == (actual is None)
            if expected is not None:
                torch.testing.assert_close(actual, expected)
    if model.memory_projection is None:
        return
    fused = FusedMemoryProjection(model.memory_projection)
    for expected_pair, actual_pair in zip(model.memory_projection(a), fused(a), strict=True):
        torch.testing.assert_close(actual_pair.key, expected_pair.key)
        torch.testing.assert_close(actual_pair.value, expected_pair.value)


def test_fusing_replaces_all_products_once() -> None:
    model = tiny_model()
    before = sum(weight.numel() for weight in model.parameters())
    fused = fuse(model)
    assert fused is model
    assert not any(isinstance(module, InputProjections) for module in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())
    gate_padding = 3 * 6 * (32 - 16)
    assert sum(weight.numel() for weight in model.parameters()) == before + gate_padding
    with pytest.raises(AssertionError, match="already fused"):
        fuse(model)


def test_a_copy_keeps_its_plain_form() -> None:
    model = tiny_model()
    fuse(copy.deepcopy(model))
    assert isinstance(model.layers[0].attention.input, InputProjections)


def test_types_are_kept() -> None:
    fused = fuse(tiny_model().to(torch.bfloat16))
    assert {weight.dtype for name, weight in fused.named_parameters() if weight.ndim == 2} == {torch.bfloat16}
