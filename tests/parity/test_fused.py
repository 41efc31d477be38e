"""Fused projections against the plain ones, whole models and in the engine."""

from __future__ import annotations

import copy

import pytest
import torch

from lrt_core.fused import fuse
from lrt_core.generate import read
from tests.engines import make_engine, oracle, request, run
from tests.helpers import VARIANTS, random_ids, tiny_config, tiny_model


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    fused, ids = fuse(copy.deepcopy(model)), random_ids(40)
    expected, actual = read(model, ids), read(fused, ids)
    torch.testing.assert_close(actual.logits, expected.logits, atol=2e-4, rtol=0)
    torch.testing.assert_close(actual.latents, expected.latents, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_the_engine(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    requests = [request(random_ids(length, seed=length), max_tokens=8) for length in (1, 20, 70)]
    done = run(make_engine(fuse(copy.deepcopy(model))), requests)
    assert done.token_ids == [oracle(model, item) for item in requests]
