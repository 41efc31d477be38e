"""The places where keys and values live, each against a plain recomputation; attention's masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrt_core.attention import attention, causal_attention, visible
from lrt_core.config import ModelConfig
from lrt_core.kv import BufferedKV, CausalKV, DenseKV, Heads
from tests.helpers import VARIANTS, tiny_config, tiny_model

LENGTH = 45
"""More than the short window (32), and odd."""


def random_heads(config: ModelConfig, length: int, seed: int, batch_size: int = 2) -> Heads:
    generator = torch.Generator().manual_seed(seed)

    def draw(num_heads: int) -> Tensor:
        return torch.randn(batch_size, length, num_heads, config.head_dim, generator=generator)

    key = draw(config.num_kv_heads)
    return Heads(draw(config.num_heads), key, draw(config.num_kv_heads), key, None)


def naive_attention(query: Tensor, key: Tensor, value: Tensor, seen: list[list[int]]) -> Tensor:
    """One query at a time over the listed keys."""
    out = torch.empty_like(query)
    repeat = query.shape[2] // key.shape[2]
    for b in range(query.shape[0]):
        for t, columns in enumerate(seen):
            for n in range(query.shape[2]):
                scores = key[b, columns, n // repeat] @ query[b, t, n] / query.shape[-1] ** 0.5
                out[b, t, n] = scores.softmax(0) @ value[b, columns, n // repeat]
    return out


@pytest.mark.parametrize("window", [5, 100])
def test_causal_attention_within_its_window(window: int) -> None:
    config = tiny_config()
    heads = random_heads(config, 12, seed=0)
    seen = [list(range(max(0, t - window), t + 1)) for t in range(12)]
    actual = causal_attention(heads.query, heads.key, heads.value, window)
    torch.testing.assert_close(actual, naive_attention(heads.query, heads.key, heads.value, seen))


def test_attention_with_a_mask_and_fewer_queries_than_keys() -> None:
    config = tiny_config()
    heads = random_heads(config, 9, seed=1)
    query, mask = heads.query[:, 6:], torch.zeros(3, 9, dtype=torch.bool)
    seen = [[0, 3], [1], [0, 1, 2, 8]]
    for row, columns in enumerate(seen):
        mask[row, columns] = True
    torch.testing.assert_close(
        attention(query, heads.key, heads.value, mask=mask), naive_attention(query, heads.key, heads.value, seen)
    )


def test_visible_counts_distances_from_zero_to_window() -> None:
    assert visible(torch.tensor([2, 3]), torch.arange(5), 2).int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]


@pytest.mark.parametrize("variant", [name for name, overrides in VARIANTS.items() if "plain" in name])
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [7, 1, 30, 7], [LENGTH]])
@torch.no_grad()
def test_dense_cache_in_any_portions_is_the_whole_sequence(variant: str, chunks: list[int]) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    tokens = torch.randint(0, 280, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    whole = model(tokens, torch.arange(LENGTH), None, CausalKV(model.config)).hidden
    kv = DenseKV(model.config, 2, LENGTH, model.dtype, model.device)
    parts = []
    for size in chunks:
        positions = torch.arange(kv.length, kv.length + size)
        parts.append(model(tokens[:, positions], positions, None, kv).hidden)
        kv.advance(size)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=0)


def test_dense_cache_overwrites_until_advanced() -> None:
    config = tiny_config()
    kv = DenseKV(config, 2, 4, torch.float32, torch.device("cpu"))
    first, second = random_heads(config, 2, seed=0), random_heads(config, 2, seed=1)
    kv.attend(0, first)
    torch.testing.assert_close(kv.attend(0, second), CausalKV(config).attend(0, second))
    kv.advance(2)
    kv.attend(0, first)
    assert torch.equal(kv.keys[0], torch.cat([second.key, first.key], dim=1))


def test_dense_cache_refuses_more_than_it_holds() -> None:
    config = tiny_config()
    kv = DenseKV(config, 2, 3, torch.float32, torch.device("cpu"))
    kv.attend(0, random_heads(config, 2, seed=0))
    kv.advance(2)
    with pytest.raises(ValueError, match="holds 3 tokens, 4 are needed"):
        kv.attend(0, random_heads(config, 2, seed=0))


def test_causal_records_only_when_asked() -> None:
    config = tiny_config()
    heads = random_heads(config, 3, seed=0)
    silent, recording = CausalKV(config), CausalKV(config, record=True)
    assert torch.equal(silent.attend(0, heads), recording.attend(0, heads))
    assert silent.recorded is None
    assert recording.recorded == [heads]


@pytest.mark.parametrize("length", [10, LENGTH])
@pytest.mark.parametrize("num_subsets", [1, 2, 3, 4])
def test_buffer_attends_to_everyones_latest(length: int, num_subsets: int) -> None:
    """Against rows written into whole tensors, for lengths that the number of subsets divides and that it does not."""
    config = tiny_config()
    recorded = [random_heads(config, length, seed=layer) for layer in range(config.num_layers)]
    kv = BufferedKV(config, recorded, num_subsets)
    keys, values = [h.key.clone() for h in recorded], [h.value.clone() for h in recorded]
    for subset in range(num_subsets):
        positions = kv.begin(subset)
        assert positions.tolist() == list(range(subset, length, num_subsets))
        for layer in range(config.num_layers):
            fresh = random_heads(config, len(positions), seed=100 + 10 * subset + layer)
            keys[layer][:, positions], values[layer][:, positions] = fresh.key, fresh.value
            window = config.window(layer)
            seen = [list(range(max(0, p - window), p + 1)) for p in positions.tolist()]
            expected = naive_attention(fresh.query, keys[layer], values[layer], seen)
            torch.testing.assert_close(kv.attend(layer, fresh), expected, atol=1e-5, rtol=0)


def test_buffer_lets_gradients_through_to_what_was_recorded() -> None:
    config = tiny_config(num_layers=1, recurrence=None)
    recorded = random_heads(config, 6, seed=0)
    recorded.value.requires_grad_()
    kv = BufferedKV(config, [recorded], 2)
    kv.begin(1)
    kv.attend(0, random_heads(config, 3, seed=1)).sum().backward()
    assert recorded.value.grad is not None
    reached = recorded.value.grad.abs().sum((0, 2, 3)) > 0
    assert reached.tolist() == [True, False] * 3, "the replaced subset no longer counts"


def test_buffer_splits_by_position() -> None:
    config = tiny_config()
    kv = BufferedKV(config, [random_heads(config, 5, seed=0)], 2)
    x = torch.arange(5).view(1, 5)
    assert [part.tolist() for part in kv.split(x)] == [[[0, 2, 4]], [[1, 3]]]
