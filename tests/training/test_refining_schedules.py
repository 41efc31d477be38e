"""multi_refine and chunked against loops over single tokens, in float64, gradients too; finite differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lrt_core.attention import attention, visible
from lrt_core.kv import Heads
from lrt_core.model import LatentRecurrentTransformer
from tests.helpers import VARIANTS, tiny_config, tiny_model
from tests.training.test_schedules import RECURRENT, gradients, make_rows
from training.schedules import Schedule
from training.schedules.chunked import chunked
from training.schedules.interleaved import interleaved
from training.schedules.losses import IGNORE
from training.schedules.multi_refine import multi_refine


class TokenKV:
    """One sequence after the other token: keys and values [B, 1, G, H] in lists."""

    def __init__(self, model: LatentRecurrentTransformer) -> None:
        self.config = model.config
        self.keys: list[list[Tensor]] = [[] for _ in range(self.config.num_layers)]
        self.values: list[list[Tensor]] = [[] for _ in range(self.config.num_layers)]

    def attend(self, layer: int, heads: Heads) -> Tensor:
        self.keys[layer].append(heads.key)
        self.values[layer].append(heads.value)
        everything = torch.arange(len(self.keys[layer]))
        mask = visible(everything[-1:], everything, self.config.window(layer))
        return attention(heads.query, torch.cat(self.keys[layer], 1), torch.cat(self.values[layer], 1), mask=mask)


def read_tokens(
    model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor, memory_of: Callable[[int, list[Tensor]], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Losses [B, T] and latents of a forward per token, whose memory is memory_of(t, latents so far)."""
    kv, losses, latents = TokenKV(model), [], list[Tensor]()
    weight, cap = model.head.weight[: model.config.vocab_size], model.config.logit_softcap
    for t in range(tokens.shape[1]):
        hidden, new = model(tokens[:, t : t + 1], torch.tensor([t]), memory_of(t, latents), kv)
        latents.append(new)
        logits = cap * torch.tanh(hidden[:, 0] @ weight.T / cap)
        losses.append(-logits.log_softmax(dim=-1).gather(1, targets[:, t : t + 1]))
    return torch.cat(losses, dim=1), latents


def naive_multi_refine(
    model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor, weights: list[float], detach: bool
) -> tuple[Tensor, list[Tensor]]:
    zeros = torch.zeros(len(tokens), 1, model.config.hidden_size, dtype=torch.float64)
    before = [zeros] * tokens.shape[1]
    passes = []
    for _ in weights:
        fed = [zeros, *(latent.detach() if detach else latent for latent in before[:-1])]
        losses, before = read_tokens(model, tokens, targets, lambda t, _, fed=fed: fed[t])  # type: ignore[misc]
        passes.append(losses)
    total = sum(weight * losses.mean() for weight, losses in zip(weights, passes, strict=True)) / sum(weights)
    assert isinstance(total, Tensor)
    return total, passes


def naive_chunked(model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor, chunk_len: int) -> Tensor:
    zeros = torch.zeros(len(tokens), 1, model.config.hidden_size, dtype=torch.float64)
    return read_tokens(model, tokens, targets, lambda t, latents: latents[-1] if t and t % chunk_len == 0 else zeros)[0]


def double_model(variant: str = "layerwise") -> LatentRecurrentTransformer:
    return tiny_model(tiny_config(**{"sequence_len": 8, **VARIANTS[variant]})).double()


def assert_same(model: LatentRecurrentTransformer, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected)
    wanted = used_gradients(model, expected)
    for name, gradient in used_gradients(model, actual).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-7, atol=1e-10, msg=name)


def used_gradients(model: LatentRecurrentTransformer, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of all weights, zeros for those that the loss does not reach."""
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True), strict=True))


@pytest.mark.parametrize("variant", RECURRENT)
def test_multi_refine_is_the_loop_over_tokens(variant: str) -> None:
    model = double_model(variant)
    tokens, targets = make_rows(model.config.vocab_size, 11)
    losses = multi_refine(model, tokens, targets, num_refinements=2)
    total, passes = naive_multi_refine(model, tokens, targets, [1.0, 1.0, 1.0], False)
    for one, wanted in zip(losses.passes, passes, strict=True):
        torch.testing.assert_close(one.token_losses, wanted)
    assert_same(model, losses.total, total)


@pytest.mark.parametrize(("weights", "detach"), [((0.1, 0.3, 0.6), False), ((0.1, 0.3, 0.6), True), ((0.0, 0.0, 2.0), True)])
def test_weights_and_detach(weights: tuple[float, ...], detach: bool) -> None:
    model = double_model()
    tokens, targets = make_rows(model.config.vocab_size, 9)
    losses = multi_refine(model, tokens, targets, num_refinements=2, loss_weights=weights, detach=detach)
    assert_same(model, losses.total, naive_multi_refine(model, tokens, targets, list(weights), detach)[0])


def test_detach_changes_gradients_alone() -> None:
    model = double_model()
    tokens, targets = make_rows(model.config.vocab_size, 9)
    whole, cut = (multi_refine(model, tokens, targets, detach=detach).total for detach in (False, True))
    assert torch.equal(whole, cut)
    name = "layers.0.mlp.up.weight"
    assert not torch.allclose(gradients(model, whole)[name], gradients(model, cut)[name])


@pytest.mark.parametrize("variant", RECURRENT)
def test_chunked_is_the_loop_over_tokens(variant: str) -> None:
    model = double_model(variant)
    tokens, targets = make_rows(model.config.vocab_size, 11)
    losses = chunked(model, tokens, targets, chunk_len=4)
    wanted = naive_chunked(model, tokens, targets, 4)
    torch.testing.assert_close(losses.passes[0].token_losses, wanted)
    assert_same(model, losses.total, wanted.mean())


@pytest.mark.parametrize("chunk_len", [1, 3, 20])
def test_chunks_of_any_length(chunk_len: int) -> None:
    """One token a chunk is the true recurrence; one chunk for all has no memory at all."""
    model = double_model()
    tokens, targets = make_rows(model.config.vocab_size, 9)
    losses = chunked(model, tokens, targets, chunk_len=chunk_len)
    torch.testing.assert_close(losses.passes[0].token_losses, naive_chunked(model, tokens, targets, chunk_len))


@pytest.mark.parametrize(
    "schedule",
    [
        partial(multi_refine, num_refinements=2, loss_weights=(0.2, 0.3, 0.5)),
        partial(chunked, chunk_len=3),
        partial(interleaved, num_subsets=3, kv_refresh=True),
    ],
)
def test_gradients_are_finite_differences(schedule: Schedule) -> None:
    """Along one random direction through all weights, in float64."""
    model = double_model()
    tokens, targets = make_rows(model.config.vocab_size, 10)
    weights = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.01 for weight in weights]
    slope = torch.autograd.grad(schedule(model, tokens, targets).total, weights)
    expected = sum(float((gradient * one).sum()) for gradient, one in zip(slope, direction, strict=True))

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for weight, one in zip(weights, direction, strict=True):
                weight.add_(one, alpha=step)
            loss = float(schedule(model, tokens, targets).total)
            for weight, one in zip(weights, direction, strict=True):
                weight.sub_(one, alpha=step)
        return loss

    step = 1e-4
    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("schedule", [multi_refine, chunked, interleaved])
def test_ignored_targets_count_nowhere(schedule: Schedule) -> None:
    model = double_model()
    tokens, targets = make_rows(model.config.vocab_size, 10)
    masked = targets.clone()
    masked[:, ::3] = IGNORE
    whole, part = schedule(model, tokens, targets), schedule(model, tokens, masked)
    for one, other in zip(whole.passes, part.passes, strict=True):
        counted = masked[:, one.positions] != IGNORE
        torch.testing.assert_close(other.token_losses, one.token_losses * counted)
    means = [one.token_losses.sum() / (masked[:, one.positions] != IGNORE).sum() for one in part.passes]
    torch.testing.assert_close(part.total, torch.stack(means).mean())


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (partial(multi_refine, num_refinements=0), "num_refinements must be at least 1"),
        (partial(multi_refine, loss_weights=(1.0, 2.0)), "loss_weights must be 3 numbers, one per forward, got 2"),
        (partial(multi_refine, loss_weights=(0.0, 0.0, 0.0)), "not all 0"),
        (partial(multi_refine, loss_weights=(1.0, -1.0, 1.0)), "at least 0"),
        (partial(chunked, chunk_len=0), "chunk_len must be at least 1"),
    ],
)
def test_options_are_checked(schedule: Schedule, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        schedule(model, *make_rows(model.config.vocab_size, 8))


@pytest.mark.parametrize("schedule", [multi_refine, chunked])
def test_plain_models_are_refused(schedule: Schedule) -> None:
    model = tiny_model(tiny_config(recurrence=None))
    with pytest.raises(ValueError, match="trains recurrent models; use baseline"):
        schedule(model, *make_rows(model.config.vocab_size, 8))
