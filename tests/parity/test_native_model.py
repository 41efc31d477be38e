"""The native model against the oracle, token by token over a paged pool whose blocks lie out of order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lrt_core import kernels
from lrt_core.generate import read
from lrt_core.native_model import NativeModel
from lrt_core.paged import NativeKV, PagedPool
from tests.helpers import VARIANTS, random_ids, tiny_config, tiny_model

needs_native = pytest.mark.skipif(not kernels.is_native(), reason="the package's build found no C++ compiler")


def int32(*numbers: int) -> npt.NDArray[np.int32]:
    return np.array(numbers, dtype=np.int32)


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_decoding_is_the_oracles(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    ids = random_ids(50)
    native = NativeModel(model, max_len=64)
    pool = PagedPool(model.config, 80, torch.float32)  # one block more than is used: native code reads ahead
    tables = int32(3, 0, 2, 1)
    memory, rows = model.zero_memory(1), []
    for position, token in enumerate(ids):
        stream = native.begin(torch.tensor([token]), torch.tensor([position]), memory)
        slots = torch.tensor([int(tables[position // 16]) * 16 + position % 16])
        kv = NativeKV(pool, 16, slots, int32(0, 1), int32(position + 1), int32(0), tables)
        latents = native.run_to_source(stream, kv)
        rows.append(native.logits(native.run_from_source(stream, latents, kv))[0])
        memory = latents if memory is not None else None
    assert (torch.stack(rows) - read(model, ids).logits).abs().max() < 1e-4
