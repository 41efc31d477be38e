"""The paged pool and one step's view of it, by hand-made layouts. `tests/parity/test_paged.py` runs whole models over it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrt_core.kv import DenseKV, Heads
from lrt_core.paged import DecodeGroup, PagedKV, PagedPool, WindowGroup
from tests.helpers import tiny_config

CONFIG = tiny_config()
CPU = torch.device("cpu")


def random_heads(num_tokens: int, seed: int) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(num_tokens, 2, 8, generator=generator) for _ in range(2))
    return Heads(torch.randn(num_tokens, 4, 8, generator=generator), key, value, key, None)


def rows(heads: Heads, start: int, stop: int) -> Heads:
    return Heads(*(x[start:stop] if x is not None else None for x in heads))


def dense_attend(past: Heads, step: Heads, layer: int) -> Tensor:
    """What a contiguous cache holding `past` answers to `step`."""
    kv = DenseKV(CONFIG, 1, 200, torch.float32, CPU)
    for heads in (past, step):
        if heads.key.shape[0]:
            out = kv.attend(layer, Heads(*(x.unsqueeze(0) if x is not None else None for x in heads)))
            kv.advance(heads.key.shape[0])
    return out[0]


def test_pool_has_one_row_more_for_no_predecessor() -> None:
    pool = PagedPool(CONFIG, 12, torch.float32)
    assert pool.keys.shape == pool.values.shape == (3, 12, 2, 8)
    assert pool.zero_row == 12
    pool.store_latents(torch.tensor([3, 0]), torch.stack([torch.full((32,), 3.0), torch.full((32,), 1.0)]))
    memory = pool.load_memory(torch.tensor([0, pool.zero_row, 3, 5]))
    assert memory[:, 0].tolist() == [1.0, 0.0, 3.0, 0.0]


def test_bytes_per_slot_is_what_the_pool_takes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pool = PagedPool(CONFIG, 7, dtype)
        taken = sum(x.numel() * x.element_size() for x in (pool.keys, pool.values, pool.latents[:-1]))
        assert taken == 7 * PagedPool.bytes_per_slot(CONFIG, dtype)


@pytest.mark.parametrize("layer", [0, 1])
def test_groups_attend_within_their_own_sequences(layer: int) -> None:
    """Two decodes of different lengths and two windows, their slots scattered over the pool; layer 0 has the short window."""
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    lengths, new = [40, 3, 50, 6], [1, 1, 7, 6]
    slots = list(order.split([*lengths, 200 - sum(lengths)]))[:4]
    pool = PagedPool(CONFIG, 200, torch.float32)
    pool.keys.normal_(), pool.values.normal_()
    sequences = [random_heads(length, seed) for seed, length in enumerate(lengths)]
    for own, heads, count in zip(slots, sequences, new, strict=True):
        past = own[: len(own) - count]
        pool.keys[layer][past], pool.values[layer][past] = heads.key[: len(past)], heads.value[: len(past)]

    steps = [rows(heads, length - count, length) for heads, length, count in zip(sequences, lengths, new, strict=True)]
    flat = Heads(*(torch.cat([step[i] for step in steps]) for i in range(4)), None)
    mapping = torch.cat([own[len(own) - count :] for own, count in zip(slots, new, strict=True)])
    padded = torch.zeros(2, 40, dtype=torch.int64)
    padded[0], padded[1, :3] = slots[0], slots[1]
    decodes = DecodeGroup(padded, torch.tensor([40, 3]))
    kv = PagedKV(pool, mapping, decodes, [WindowGroup(2, 7, slots[2]), WindowGroup(9, 6, slots[3])])
    expected = [
        dense_attend(rows(heads, 0, length - count), step, layer)
        for heads, length, count, step in zip(sequences, lengths, new, steps, strict=True)
    ]
    torch.testing.assert_close(kv.attend(layer, flat), torch.cat(expected), atol=1e-5, rtol=0)
    assert torch.equal(pool.keys[layer][slots[2]], sequences[2].key)


def test_only_a_window_or_only_decodes() -> None:
    heads = random_heads(5, seed=0)
    for decodes, windows in (
        (None, [WindowGroup(0, 5, torch.arange(5))]),
        (DecodeGroup(torch.arange(5)[:, None], torch.ones(5, dtype=torch.int64)), []),
    ):
        out = PagedKV(PagedPool(CONFIG, 5, torch.float32), torch.arange(5), decodes, windows).attend(0, heads)
        assert out.shape == (5, 4, 8)
        torch.testing.assert_close(out[0], heads.value[0].repeat_interleave(2, dim=0))


def test_masks() -> None:
    decodes = DecodeGroup(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([5, 2]))
    assert decodes.mask(2).int().squeeze().tolist() == [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]
    window = WindowGroup(0, 2, torch.arange(5))
    assert window.mask(2).int().squeeze().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
