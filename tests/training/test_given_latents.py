"""Interleaved from given latents: against a loop over single tokens in float64, at the fixed point, and on a served rollout."""

from __future__ import annotations

import base64
import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lrt_core.attention import attention, visible
from lrt_core.generate import read
from lrt_core.kernels import rope_norm
from lrt_core.kv import Heads
from lrt_core.model import LatentRecurrentTransformer, make_rope
from tests.helpers import VARIANTS, contracting_model, tiny_config, tiny_model
from tests.server.live import PROMPT, Live
from tests.training.test_refining_schedules import assert_same, double_model
from tests.training.test_schedules import RECURRENT, make_rows
from training.schedules.interleaved import interleaved
from training.schedules.losses import IGNORE


class Buffer:
    """Every position's heads per layer, each [B, 1, G, H]; a forward is of the one position `at`, which it replaces."""

    def __init__(self, model: LatentRecurrentTransformer, length: int) -> None:
        self.config, self.at = model.config, 0
        self.heads: list[list[Heads | None]] = [[None] * length for _ in range(model.config.num_layers)]

    def attend(self, layer: int, heads: Heads) -> Tensor:
        self.heads[layer][self.at] = heads
        seen = [one for one in self.heads[layer][: self.at + 1] if one is not None]
        mask = visible(torch.tensor([self.at]), torch.arange(self.at + 1), self.config.window(layer))
        return attention(heads.query, torch.cat([h.key for h in seen], 1), torch.cat([h.value for h in seen], 1), mask=mask)


def naive(
    model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor, given: Tensor, subsets: int, refresh: bool
) -> tuple[Tensor, list[Tensor]]:
    """Total and every forward's losses [B, T_i], position by position: only the past is visible, so later ones can wait."""
    length, buffer = tokens.shape[1], Buffer(model, tokens.shape[1])
    zeros = torch.zeros_like(given[:, :1])
    weight, cap = model.head.weight[: model.config.vocab_size], model.config.logit_softcap

    def memory_at(latents: list[Tensor], t: int) -> Tensor:
        return latents[t - 1] if t else zeros

    def compute(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        buffer.at = t
        hidden, latent = model(tokens[:, t : t + 1], torch.tensor([t]), memory, buffer)
        logits = cap * torch.tanh(hidden[:, 0] @ weight.T / cap)
        return -logits.log_softmax(dim=-1).gather(1, targets[:, t : t + 1]), latent

    start = [given[:, t : t + 1].detach() for t in range(length)]
    results = [compute(t, memory_at(start, t)) for t in range(length)]
    passes, latents = [torch.cat([loss for loss, _ in results], dim=1)], [latent for _, latent in results]
    fed = [memory_at(start, t) for t in range(length)]
    for subset in range(subsets):
        if refresh:
            for t in (t for t in range(length) if t % subsets >= subset):
                reproject(model, buffer, t, memory_at(latents, t), fed[t])
                fed[t] = memory_at(latents, t)
        chosen, before = range(subset, length, subsets), list(latents)
        results = [compute(t, memory_at(before, t)) for t in chosen]
        passes.append(torch.cat([loss for loss, _ in results], dim=1))
        for t, (_, latent) in zip(chosen, results, strict=True):
            latents[t] = latent
    return torch.stack([losses.mean() for losses in passes]).mean(), passes


def reproject(model: LatentRecurrentTransformer, buffer: Buffer, t: int, new: Tensor, old: Tensor) -> None:
    """Give position t the keys and values of another memory, with the gates it has."""
    if model.memory_projection is None:
        return
    rope = make_rope(model.config, torch.tensor([t]))
    for layer, (now, before) in enumerate(zip(model.memory_projection(new), model.memory_projection(old), strict=True)):
        heads = buffer.heads[layer][t]
        assert heads is not None and heads.memory_gate is not None
        raw = heads.raw_key + heads.memory_gate * (now.key - before.key)
        value = heads.value + heads.memory_gate * (now.value - before.value)
        buffer.heads[layer][t] = heads._replace(key=rope_norm(raw, *rope), value=value, raw_key=raw)


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize(("variant", "subsets"), [*((variant, 2) for variant in RECURRENT), ("layerwise", 1), ("layerwise", 3)])
def test_the_loop_over_tokens(variant: str, subsets: int, refresh: bool) -> None:
    model = double_model(variant)
    tokens, targets = make_rows(model.config.vocab_size, 11)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 11, model.config.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
    losses = interleaved(model, tokens, targets, num_subsets=subsets, kv_refresh=refresh, latents=latents)
    total, passes = naive(model, tokens, targets, latents, subsets, refresh)
    for one, wanted in zip(losses.passes, passes, strict=True):
        torch.testing.assert_close(one.token_losses, wanted)
    assert_same(model, losses.total, total)
    (reached,) = torch.autograd.grad(losses.total, latents, allow_unused=True)
    assert reached is None, "a gradient flows into the latents given"


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("variant", RECURRENT)
def test_latents_of_decoding_give_its_losses_in_every_forward(variant: str, refresh: bool) -> None:
    """Its memories are the recurrence's fixed point: the forward over all positions has the sequential losses at once."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    tokens, targets = make_rows(model.config.vocab_size, 12)
    decoded = [read(model, row) for row in tokens.tolist()]
    wanted = torch.stack(
        [-one.logits.log_softmax(-1).gather(1, row[:, None])[:, 0] for one, row in zip(decoded, targets, strict=True)]
    )
    latents = torch.stack([one.latents for one in decoded])
    for one in interleaved(model, tokens, targets, num_subsets=3, kv_refresh=refresh, latents=latents).passes:
        torch.testing.assert_close(one.token_losses, wanted[:, one.positions], rtol=1e-4, atol=1e-4)
    zero = interleaved(model, tokens, targets, num_subsets=3).passes[0].token_losses
    assert not torch.allclose(zero, wanted, atol=1e-2), "zero memory has other losses"


def rollout(model: LatentRecurrentTransformer) -> dict[str, Any]:
    """A sampled continuation of PROMPT, as a server gives it."""
    response = Live(copy.deepcopy(model)).ask(
        latents="all", max_tokens=30, temperature=1.0, seed=7, ignore_eos=True, logprobs=0, return_token_ids=True
    )
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_step_on_a_served_rollout(advantage: float) -> None:
    """As the schedule's docstring has it: a reward makes what was sampled likelier under decoding, a penalty less likely."""
    model = contracting_model()
    choice = rollout(model)
    ids = [*PROMPT, *choice["token_ids"]]
    data = base64.b64decode(choice["latents"]["data"])
    rows = torch.frombuffer(bytearray(data), dtype=torch.float32).view(1, *choice["latents"]["shape"])
    tokens, targets = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    weights = torch.zeros(1, len(ids) - 1)
    weights[:, len(PROMPT) - 1 :] = advantage

    losses = interleaved(model, tokens, targets, latents=rows)
    served = -torch.tensor(choice["logprobs"]["token_logprobs"])
    torch.testing.assert_close(losses.passes[0].token_losses[0, len(PROMPT) - 1 :], served, rtol=1e-3, atol=1e-3)
    means = [(weights[:, one.positions] * one.token_losses).mean() for one in losses.passes]
    torch.stack(means).mean().backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 0.01 * weight.grad
    logits = read(model, ids[:-1]).logits[len(PROMPT) - 1 :]
    after = -logits.log_softmax(-1).gather(1, targets[0, len(PROMPT) - 1 :, None])[:, 0]
    assert float((served - after).mean()) * advantage > 1e-3


def test_weights_of_one_are_the_schedule_s_own_total() -> None:
    """Per-token losses carry gradients; targets that are ignored have none."""
    model = tiny_model()
    tokens, targets = make_rows(model.config.vocab_size, 10)
    targets = targets.clone()
    targets[:, :4] = IGNORE
    losses = interleaved(model, tokens, targets)
    counted = (targets != IGNORE).float()
    means = [(counted[:, one.positions] * one.token_losses).sum() / counted[:, one.positions].sum() for one in losses.passes]
    torch.testing.assert_close(torch.stack(means).mean(), losses.total)
    assert all(one.token_losses.requires_grad for one in losses.passes)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(2, 9, 32), r"latents must have the shape \[2, 10, 32\], got \[2, 9, 32\]"),
        (torch.full((2, 10, 32), torch.nan), "latents must be finite"),
    ],
)
def test_bad_latents_are_refused(latents: Tensor, message: str) -> None:
    model = tiny_model()
    tokens, targets = make_rows(model.config.vocab_size, 10)
    with pytest.raises(ValueError, match=message):
        interleaved(model, tokens, targets, latents=latents)
