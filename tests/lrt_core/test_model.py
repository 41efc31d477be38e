"""The forward against the architecture's formulas, written out once more here for a single token, for every variant."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lrt_core.config import ModelConfig, RecurrenceConfig
from lrt_core.kernels import norm, rotate
from lrt_core.kv import CausalKV, DenseKV
from lrt_core.memory import shift
from lrt_core.model import LatentRecurrentTransformer, make_rope
from tests.helpers import VARIANTS, random_ids, tiny_config, tiny_model

NUM_TOKENS = 40
"""Beyond the short window of tiny_config (32)."""


def rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def rotated(x: Tensor, position: int, config: ModelConfig) -> Tensor:
    """Heads [N, H] of one token: channel c pairs with channel c + H/2."""
    out, half = x.clone(), config.head_dim // 2
    for c in range(half):
        angle = torch.tensor(float(position)) * config.rope_base ** (-2 * c / config.head_dim)
        dtype = torch.bfloat16 if config.rope_dtype == "bfloat16" else torch.float32
        cos, sin = angle.cos().to(dtype).float(), angle.sin().to(dtype).float()
        out[:, c] = x[:, c] * cos + x[:, c + half] * sin
        out[:, c + half] = x[:, c + half] * cos - x[:, c] * sin
    return out


class Reference:
    """One sequence token by token from the state dict: nothing shared with the package but the weights' names."""

    def __init__(self, model: LatentRecurrentTransformer) -> None:
        self.config, self.weights = model.config, dict(model.state_dict())
        self.cache: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.config.num_layers)]
        self.memory = torch.zeros(self.config.hidden_size)

    def step(self, token: int) -> tuple[Tensor, Tensor]:
        """Logits [V] and latent [D]."""
        x = x0 = rms_norm(self.weights["embedding.weight"][token])
        latent = x
        for i in range(self.config.num_layers):
            x = self._scale("residual_scale", i, 1.0) * x + self._scale("embedding_scale", i, 0.0) * x0
            x = x + self._scale("memory_scale", i, 0.0) * self.memory
            x = x + self._weight(i, "attention.output") @ self._attention(i, rms_norm(x), token).flatten()
            x = x + self._weight(i, "mlp.down") @ (self._weight(i, "mlp.up") @ rms_norm(x)).clamp_min(0).square()
            if i == self.config.source_layer:
                latent = rms_norm(x)
        if self.config.recurrence is not None:
            self.memory = latent
        raw = self.weights["head.weight"] @ rms_norm(x)
        return 15 * torch.tanh(raw[: self.config.vocab_size] / 15), latent

    def _scale(self, name: str, layer: int, default: float) -> Tensor | float:
        return self.weights[name][layer] if name in self.weights else default

    def _weight(self, layer: int, name: str) -> Tensor:
        return self.weights[f"layers.{layer}.{name}.weight"]

    def _attention(self, i: int, a: Tensor, token: int) -> Tensor:
        config, position = self.config, len(self.cache[i])
        query, key, value = (
            (self._weight(i, f"attention.input.{name}") @ a).view(-1, config.head_dim) for name in ("query", "key", "value")
        )
        key, value = self._mixed(i, a, token, key, value)
        query, key = (rms_norm(rotated(x, position, config)) for x in (query, key))
        self.cache[i].append((key, value))
        is_long = i == config.num_layers - 1 or config.window_pattern[i % len(config.window_pattern)] == "L"
        window = config.sequence_len if is_long else config.sequence_len // 2
        seen = self.cache[i][max(0, position - window) :]
        out = []
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.num_kv_heads)
            scores = torch.stack([query[head] @ key[group] for key, _ in seen]) / math.sqrt(config.head_dim)
            out.append(sum(p * value[group] for p, (_, value) in zip(scores.softmax(0), seen, strict=True)))
        return torch.stack(out)

    def _mixed(self, i: int, a: Tensor, token: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Memory and value embedding through the gates, rows local, memory, value embedding."""
        config = self.config
        if f"layers.{i}.attention.input.gate.weight" not in self.weights:
            return key, value
        gates = 2 * torch.sigmoid(self._weight(i, "attention.input.gate") @ a[: config.gate_channels or config.hidden_size])
        gates = gates.view(-1, config.num_kv_heads, 1)
        if config.kv_projection:
            pair = i if config.recurrence is not None and config.recurrence.variant == "layerwise" else 0
            memory = [self.weights[f"memory_projection.{name}.{pair}.weight"] @ self.memory for name in ("key", "value")]
            key = gates[0] * key + gates[1] * memory[0].view_as(key)
            value = gates[0] * value + gates[1] * memory[1].view_as(value)
        if f"layers.{i}.attention.value_embedding.weight" in self.weights:
            embedding = self._weight(i, "attention.value_embedding")[token]
            value = value + gates[-1] * embedding.view_as(value)
        return key, value


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_formulas(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    ids = random_ids(NUM_TOKENS)
    reference = Reference(model)
    steps = [reference.step(token) for token in ids]
    expected_logits, expected_latents = (torch.stack(rows) for rows in zip(*steps, strict=True))

    kv = DenseKV(model.config, 1, NUM_TOKENS, model.dtype, model.device)
    memory = model.zero_memory(1, 1)
    for position, token in enumerate(ids):
        hidden, latents = model(torch.tensor([[token]]), torch.tensor([position]), memory, kv)
        kv.advance(1)
        memory = latents if memory is not None else None
        torch.testing.assert_close(model.logits(hidden)[0, 0], expected_logits[position], atol=2e-4, rtol=0)
        torch.testing.assert_close(latents[0, 0], expected_latents[position], atol=2e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_whole_sequence_given_its_memories(variant: str) -> None:
    """All positions at once with the true memories are the tokens one by one: the forward knows no phases."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    ids = random_ids(NUM_TOKENS)
    reference = Reference(model)
    steps = [reference.step(token) for token in ids]
    logits, latents = (torch.stack(rows) for rows in zip(*steps, strict=True))
    memory = shift(latents).unsqueeze(0) if model.config.recurrence is not None else None
    result = model(torch.tensor([ids]), torch.arange(NUM_TOKENS), memory, CausalKV(model.config))
    torch.testing.assert_close(model.logits(result.hidden)[0], logits, atol=2e-4, rtol=0)
    torch.testing.assert_close(result.latents[0], latents, atol=2e-4, rtol=0)


def test_memory_and_recurrence_must_agree() -> None:
    tokens, positions = torch.tensor([[1, 2]]), torch.arange(2)
    recurrent, plain = tiny_model(), tiny_model(tiny_config(**VARIANTS["plain"]))
    with pytest.raises(ValueError, match="memory"):
        recurrent(tokens, positions, None, CausalKV(recurrent.config))
    with pytest.raises(ValueError, match="memory"):
        plain(tokens, positions, torch.zeros(1, 2, 32), CausalKV(plain.config))
    assert plain.zero_memory(1, 2) is None


@torch.no_grad()
def test_zeros_are_not_no_memory() -> None:
    """With a memory of zeros the local gate still scales keys and values: the plain model of the same weights differs."""
    model = tiny_model(tiny_config(value_embeddings="none"))
    plain = LatentRecurrentTransformer(replace(model.config, recurrence=None)).eval()
    left_over = plain.load_state_dict(model.state_dict(), strict=False)
    assert not left_over.missing_keys
    tokens, positions = torch.tensor([random_ids(6)]), torch.arange(6)
    with_zeros = model(tokens, positions, model.zero_memory(1, 6), CausalKV(model.config)).hidden
    without = plain(tokens, positions, None, CausalKV(plain.config)).hidden
    assert float((with_zeros - without).abs().max()) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("injection", "projection"), [(True, False), (False, True), (True, True)])
def test_each_path_carries_memory(injection: bool, projection: bool) -> None:
    model = tiny_model(tiny_config(recurrence=RecurrenceConfig(2, "layerwise", injection, projection)))
    tokens, positions = torch.tensor([[5]]), torch.tensor([1])
    memory = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))
    hidden = [model(tokens, positions, m, CausalKV(model.config)).hidden for m in (memory, torch.zeros_like(memory))]
    assert float((hidden[0] - hidden[1]).abs().max()) > 1e-3


@torch.no_grad()
def test_source_layer_is_where_latents_leave() -> None:
    for source in range(3):
        model = tiny_model(tiny_config(recurrence=RecurrenceConfig(source)))
        tokens = torch.tensor([random_ids(5)])
        result = model(tokens, torch.arange(5), model.zero_memory(1, 5), CausalKV(model.config))
        assert torch.equal(result.hidden, result.latents) == (source == 2)
        torch.testing.assert_close(result.latents.square().mean(-1), torch.ones(1, 5))


@torch.no_grad()
def test_windows_limit_what_a_token_sees() -> None:
    """In one layer of window 8 (its last layer is always L: sequence_len) token 9 no longer depends on token 0."""
    config = tiny_config(num_layers=1, sequence_len=8, recurrence=None)
    assert config.window(0) == 8
    model = tiny_model(config)
    ids = random_ids(12)
    changed = [(ids[0] + 1) % config.vocab_size, *ids[1:]]
    hidden = [model(torch.tensor([row]), torch.arange(12), None, CausalKV(config)).hidden[0] for row in (ids, changed)]
    differs = (hidden[0] - hidden[1]).abs().amax(-1) > 1e-6
    assert differs.tolist() == [True] * 9 + [False] * 3


@torch.no_grad()
def test_logits_are_cut_capped_and_float32() -> None:
    model = tiny_model(tiny_config(vocab_size=70, logit_softcap=3.0)).to(torch.bfloat16)
    assert model.head.weight.shape[0] == 128
    hidden = 100 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    logits = model.logits(hidden)
    assert logits.shape == (2, 70)
    assert logits.dtype == torch.float32
    assert float(logits.abs().max()) <= 3.0
    raw = model.head(hidden).float()[:, :70]
    torch.testing.assert_close(logits, 3 * torch.tanh(raw / 3))


@torch.no_grad()
def test_padding_rows_of_the_vocabulary_are_never_read() -> None:
    model = tiny_model(tiny_config(vocab_size=70))
    before = model.logits(torch.ones(1, 32))
    model.head.weight[70:] = 1e9
    assert torch.equal(model.logits(torch.ones(1, 32)), before)


def test_zero_memory_follows_the_model() -> None:
    memory = tiny_model().to(torch.bfloat16).zero_memory(2, 3)
    assert memory is not None
    assert memory.shape == (2, 3, 32)
    assert memory.dtype == torch.float32  # of the residual stream, which bfloat16 weights do not narrow
    assert not memory.any()


def test_fresh_weights() -> None:
    model = LatentRecurrentTransformer(tiny_config())
    model.init_weights(torch.Generator().manual_seed(0))
    again = LatentRecurrentTransformer(tiny_config())
    again.init_weights(torch.Generator().manual_seed(0))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())
    assert not weights["layers.0.attention.output.weight"].any()
    assert not weights["layers.1.mlp.down.weight"].any()
    assert not weights["layers.2.attention.input.gate.weight"].any()
    assert weights["residual_scale"].tolist() == [1.0] * 3
    torch.testing.assert_close(weights["memory_scale"], torch.full((3,), 0.1))
    assert float(weights["layers.0.mlp.up.weight"].std()) == pytest.approx(32**-0.5, rel=0.05)
    assert float(weights["layers.0.mlp.up.weight"].abs().max()) <= math.sqrt(3 / 32)


def test_rope_rotates_by_position_and_keeps_length() -> None:
    config = tiny_config(rope_dtype="float32")
    x = torch.randn(1, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    rotated_x = rotate(x, *make_rope(config, torch.tensor([0, 7, 50])))
    assert torch.equal(rotated_x[:, 0], x[:, 0])
    torch.testing.assert_close(rotated_x.norm(dim=-1), x.norm(dim=-1))
    dots = [
        float(
            (
                rotate(x[:, :1], *make_rope(config, torch.tensor([p])))
                * rotate(x[:, 1:2], *make_rope(config, torch.tensor([p + 5])))
            ).sum()
        )
        for p in (0, 11)
    ]
    assert dots[0] == pytest.approx(dots[1], abs=1e-4), "only distances count"


def test_norm_has_no_weight_and_survives_zeros() -> None:
    assert not norm(torch.zeros(2, 8)).any()
    torch.testing.assert_close(norm(torch.full((1, 4), 3.0)), torch.ones(1, 4))
