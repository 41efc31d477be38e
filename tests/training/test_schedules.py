"""Schedules against a reference that keeps whole buffers and scatters into them, as one would write it down."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrt_core.attention import attention, visible
from lrt_core.kernels import rope_norm
from lrt_core.kv import CausalKV, Heads
from lrt_core.memory import shift
from lrt_core.model import LatentRecurrentTransformer, make_rope
from tests.helpers import VARIANTS, tiny_config, tiny_model
from training.schedules.baseline import baseline
from training.schedules.interleaved import interleaved
from training.schedules.losses import token_losses

RECURRENT = [name for name in VARIANTS if not name.startswith("plain")]


class WholeBuffers:
    """Keys and values [B, T, ...] of every layer; a forward's positions are written into clones of them."""

    def __init__(self, model: LatentRecurrentTransformer, recorded: list[Heads]) -> None:
        self.model, self.recorded = model, recorded
        self.keys = [heads.key for heads in recorded]
        self.values = [heads.value for heads in recorded]
        self.raw_keys = [heads.raw_key for heads in recorded]
        self.positions = torch.arange(0)

    def attend(self, layer: int, heads: Heads) -> Tensor:
        key, value = self.keys[layer].clone(), self.values[layer].clone()
        key[:, self.positions], value[:, self.positions] = heads.key, heads.value
        self.keys[layer], self.values[layer] = key, value
        mask = visible(self.positions, torch.arange(key.shape[1]), self.model.config.window(layer))
        return attention(heads.query, key, value, mask=mask)

    def refresh(self, new: Tensor, old: Tensor, unvisited: Tensor) -> None:
        """Add the projected change of memory at the unvisited positions."""
        if self.model.memory_projection is None:
            return
        rope = make_rope(self.model.config, torch.arange(new.shape[1]))
        projected = zip(self.model.memory_projection(new), self.model.memory_projection(old), strict=True)
        for layer, (now, before) in enumerate(projected):
            gate = self.recorded[layer].memory_gate
            assert gate is not None
            gate = gate * unvisited[None, :, None, None]
            self.values[layer] = self.values[layer] + gate * (now.value - before.value)
            self.raw_keys[layer] = self.raw_keys[layer] + gate * (now.key - before.key)
            fresh = rope_norm(self.raw_keys[layer], *rope)
            self.keys[layer] = torch.where(unvisited[None, :, None, None], fresh, self.keys[layer])


def reference(model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor, subsets: int, refresh: bool) -> list[Tensor]:
    """The mean loss of every forward, refreshing after each of them."""
    length = tokens.shape[1]
    everything = torch.arange(length)
    start = torch.zeros(*tokens.shape, model.config.hidden_size)
    causal = CausalKV(model.config, record=True)
    hidden, latents = model(tokens, everything, start, causal)
    losses = [F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten())]
    assert causal.recorded is not None
    buffers = WholeBuffers(model, causal.recorded)
    refreshed_with, visited = start, torch.zeros(length, dtype=torch.bool)
    for subset in range(subsets):
        memory = shift(latents)
        if refresh:
            buffers.refresh(memory, refreshed_with, ~visited)
            refreshed_with = memory
        chosen = everything[everything % subsets == subset]
        buffers.positions = chosen
        hidden, new = model(tokens[:, chosen], chosen, memory[:, chosen], buffers)
        latents = latents.clone()
        latents[:, chosen] = new
        visited[chosen] = True
        losses.append(F.cross_entropy(model.logits(hidden).flatten(0, 1), targets[:, chosen].flatten()))
    return losses


def gradients(model: LatentRecurrentTransformer, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def make_rows(vocab_size: int, length: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(1))
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize(("subsets", "length"), [(1, 9), (2, 10), (2, 11), (3, 10), (4, 11), (5, 5)])
def test_interleaved_is_the_reference(subsets: int, length: int, refresh: bool) -> None:
    model = tiny_model(tiny_config(sequence_len=8))
    tokens, targets = make_rows(model.config.vocab_size, length)
    losses = interleaved(model, tokens, targets, num_subsets=subsets, kv_refresh=refresh)
    expected = reference(model, tokens, targets, subsets, refresh)
    torch.testing.assert_close(torch.stack([one.token_losses.mean() for one in losses.passes]), torch.stack(expected))
    wanted = gradients(model, torch.stack(expected).mean())
    for name, gradient in gradients(model, losses.total).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("variant", RECURRENT)
def test_every_variant(variant: str, refresh: bool) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    tokens, targets = make_rows(model.config.vocab_size, 11)
    losses = interleaved(model, tokens, targets, num_subsets=3, kv_refresh=refresh)
    expected = reference(model, tokens, targets, 3, refresh)
    torch.testing.assert_close(torch.stack([one.token_losses.mean() for one in losses.passes]), torch.stack(expected))


def test_refresh_changes_the_losses() -> None:
    model = tiny_model()
    tokens, targets = make_rows(model.config.vocab_size, 12)
    without, refreshed = (interleaved(model, tokens, targets, num_subsets=3, kv_refresh=flag) for flag in (False, True))
    assert torch.equal(without.passes[0].token_losses, refreshed.passes[0].token_losses)
    assert not torch.allclose(without.passes[1].token_losses, refreshed.passes[1].token_losses, atol=1e-4)


def test_passes_cover_their_subsets() -> None:
    model = tiny_model()
    tokens, targets = make_rows(model.config.vocab_size, 8)
    passes = interleaved(model, tokens, targets, num_subsets=3).passes
    assert [one.positions.tolist() for one in passes] == [list(range(8)), [0, 3, 6], [1, 4, 7], [2, 5]]
    assert [tuple(one.token_losses.shape) for one in passes] == [(2, 8), (2, 3), (2, 3), (2, 2)]


@pytest.mark.parametrize("subsets", [0, 9])
def test_number_of_subsets_must_fit(subsets: int) -> None:
    model = tiny_model()
    tokens, targets = make_rows(model.config.vocab_size, 8)
    with pytest.raises(ValueError, match=r"num_subsets must lie in 1\.\.8"):
        interleaved(model, tokens, targets, num_subsets=subsets)


def test_schedules_refuse_the_wrong_model() -> None:
    plain, recurrent = tiny_model(tiny_config(recurrence=None)), tiny_model()
    tokens, targets = make_rows(plain.config.vocab_size, 8)
    with pytest.raises(ValueError, match="baseline"):
        baseline(recurrent, tokens, targets)
    with pytest.raises(ValueError, match="interleaved"):
        interleaved(plain, tokens, targets)


@pytest.mark.parametrize("variant", ["plain", "plain-bare"])
def test_baseline_is_plain_cross_entropy(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    tokens, targets = make_rows(model.config.vocab_size, 9)
    hidden, _ = model(tokens, torch.arange(9), None, CausalKV(model.config))
    expected = F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten())
    losses = baseline(model, tokens, targets)
    torch.testing.assert_close(losses.total, expected)
    assert losses.passes[0].positions.tolist() == list(range(9))


def test_chunked_loss_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five rows over 18, against the logits at once; every token's loss weighs differently."""
    model = tiny_model()
    monkeypatch.setattr("training.schedules.losses._CHUNK_ELEMENTS", 5 * model.config.vocab_size)
    _, targets = make_rows(model.config.vocab_size, 9)
    hidden = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weights = torch.rand(2, 9, generator=torch.Generator().manual_seed(3))
    whole = F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten(), reduction="none").view(2, 9)
    chunked = token_losses(model, hidden, targets)
    torch.testing.assert_close(chunked, whole)
    wanted = torch.autograd.grad((whole * weights).sum(), (hidden, model.head.weight))
    actual = torch.autograd.grad((chunked * weights).sum(), (hidden, model.head.weight))
    torch.testing.assert_close(actual, wanted)
