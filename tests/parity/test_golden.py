"""The model against the authors' release, from its own files through the converter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrt_core import kernels
from lrt_core.checkpoint import load_model
from lrt_core.generate import generate, read
from lrt_core.kv import CausalKV, DenseKV
from lrt_core.memory import shift
from lrt_core.model import LatentRecurrentTransformer
from tests.helpers import GOLDEN_NAMES, PLAIN_GOLDEN, RECURRENT_GOLDEN, golden_expected

LOGIT_TOLERANCE = 1e-4


@pytest.fixture(params=["native", "torch"], autouse=True)
def operators(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every case with the native kernels, where they were built, and with their torch twins: the oracle rests on both."""
    with kernels.native(request.param == "native"):
        yield


def difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


@pytest.fixture(params=GOLDEN_NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str, golden_checkpoints: dict[str, Path]) -> LatentRecurrentTransformer:
    return load_model(golden_checkpoints[name])


@pytest.fixture
def expected(name: str) -> dict[str, Tensor]:
    return golden_expected(name)


@pytest.mark.parametrize("name", RECURRENT_GOLDEN, indirect=True)
@torch.no_grad()
def test_refinement_passes(model: LatentRecurrentTransformer, expected: dict[str, Tensor]) -> None:
    tokens = expected["tokens"]
    positions = torch.arange(tokens.shape[1])
    memory = model.zero_memory(*tokens.shape)
    for key in ("zero_memory_logits", "refine1_logits", "refine2_logits"):
        hidden, latents = model(tokens, positions, memory, CausalKV(model.config))
        assert difference(model.logits(hidden), expected[key]) < LOGIT_TOLERANCE, key
        memory = shift(latents)


@pytest.mark.parametrize("name", RECURRENT_GOLDEN, indirect=True)
@torch.no_grad()
def test_refinement_reaches_the_recurrence(model: LatentRecurrentTransformer, expected: dict[str, Tensor]) -> None:
    """As many passes as tokens are exact, whether or not the recurrence contracts."""
    tokens = expected["tokens"]
    positions = torch.arange(tokens.shape[1])
    memory = model.zero_memory(*tokens.shape)
    for _ in range(tokens.shape[1]):
        hidden, latents = model(tokens, positions, memory, CausalKV(model.config))
        memory = shift(latents)
    assert difference(model.logits(hidden), expected["recurrent_logits"]) < LOGIT_TOLERANCE
    assert difference(latents, expected["recurrent_memory"]) < LOGIT_TOLERANCE


@pytest.mark.parametrize("name", RECURRENT_GOLDEN, indirect=True)
@torch.no_grad()
def test_token_by_token(model: LatentRecurrentTransformer, expected: dict[str, Tensor]) -> None:
    tokens = expected["tokens"]
    kv = DenseKV(model.config, *tokens.shape, model.dtype, model.device)
    memory = model.zero_memory(tokens.shape[0], 1)
    for position in range(tokens.shape[1]):
        hidden, memory = model(tokens[:, position : position + 1], torch.tensor([position]), memory, kv)
        kv.advance(1)
        assert difference(model.logits(hidden)[:, 0], expected["recurrent_logits"][:, position]) < LOGIT_TOLERANCE
        assert difference(memory[:, 0], expected["recurrent_memory"][:, position]) < LOGIT_TOLERANCE


def test_oracle(name: str, model: LatentRecurrentTransformer, expected: dict[str, Tensor]) -> None:
    logits = expected["logits" if name == PLAIN_GOLDEN else "recurrent_logits"]
    for row in range(2):
        result = read(model, expected["tokens"][row].tolist())
        assert difference(result.logits, logits[row]) < LOGIT_TOLERANCE
        if name != PLAIN_GOLDEN:
            assert difference(result.latents, expected["recurrent_memory"][row]) < LOGIT_TOLERANCE


@pytest.mark.parametrize("name", RECURRENT_GOLDEN, indirect=True)
def test_greedy_continuation(model: LatentRecurrentTransformer, expected: dict[str, Tensor]) -> None:
    tokens = expected["greedy_tokens"].tolist()
    assert tokens[:16] == expected["tokens"][0, :16].tolist()
    assert list(generate(model, tokens[:16], len(tokens) - 16)) == tokens[16:]


@pytest.mark.parametrize("name", [PLAIN_GOLDEN], indirect=True)
@torch.no_grad()
def test_plain_forward(model: LatentRecurrentTransformer, expected: dict[str, Tensor]) -> None:
    tokens = expected["tokens"]
    positions = torch.arange(tokens.shape[1])
    whole = CausalKV(model.config)
    cached = DenseKV(model.config, *tokens.shape, model.dtype, model.device)
    for kv in (whole, cached):
        logits = model.logits(model(tokens, positions, None, kv).hidden)
        assert difference(logits, expected["logits"]) < LOGIT_TOLERANCE
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), expected["targets"].flatten())
        assert difference(loss.unsqueeze(0), expected["loss"]) < 1e-5


def test_recurrence_shows_in_the_logits(golden_checkpoints: dict[str, Path]) -> None:
    """The tolerance can tell a skipped memory, and skipping it is refused."""
    model = load_model(golden_checkpoints["lrt-layerwise"])
    expected = golden_expected("lrt-layerwise")
    assert difference(expected["zero_memory_logits"], expected["recurrent_logits"]) > 100 * LOGIT_TOLERANCE
    with pytest.raises(ValueError, match="memory"):
        model(expected["tokens"], torch.arange(60), None, CausalKV(model.config))
