"""The native model against the oracle, token by token over a paged pool whose blocks lie out of order."""

from __future__ import annotations

from array import array

import pytest
import torch

from lrt_core import kernels
from lrt_core.generate import read
from lrt_core.kernels.plan import PackedMatrix, quantize_rows
from lrt_core.kernels.products import apply, apply_twin
from lrt_core.native_model import NativeModel
from lrt_core.paged import PagedPool
from lrt_core.step import PagedStep
from tests.helpers import VARIANTS, random_ids, tiny_config, tiny_model

needs_native = pytest.mark.skipif(not kernels.is_native(), reason="the package's build found no C++ compiler")


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_decoding_is_the_oracles(variant: str, instruction_set: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    ids = random_ids(50)
    native = NativeModel(model, max_len=64)
    pool = PagedPool(model.config, 80, torch.float32)  # one block more than is used: native code reads ahead
    rows = []
    for position, token in enumerate(ids):
        sequence = array("q", (position, 1, position, 4, 0, 0))
        step = PagedStep(array("q", [token]), sequence, array("i", (3, 0, 2, 1)), 16)
        result = native.run_step(step, pool, tolerance=0.0)
        assert (result.num_settled, result.residuals, result.is_finite) == ([1], [None], [True])
        rows.append(native.logits(result.hidden)[0])
    assert (torch.stack(rows) - read(model, ids).logits).abs().max() < 1e-4


@needs_native
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_what_is_no_number_stays_so(kind: str, instruction_set: str) -> None:
    weight = torch.randn(40, 33)
    matrix = PackedMatrix(weight.bfloat16() if kind == "bfloat16" else weight, quantize=kind == "int8")
    x = torch.randn(3, 33)
    x[1, 5] = torch.nan
    logits = apply(matrix, x, softcap=15.0)
    assert logits[1].isnan().all()
    assert logits[0].isfinite().all() and logits[2].isfinite().all()


@needs_native
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 16), (40, 33), (130, 96), (272, 768)])
@torch.no_grad()
def test_products_and_rows_that_do_not_see_each_other(kind: str, n: int, k: int, instruction_set: str) -> None:
    """Against torch; and every row bit-equal alone and in batches of all sizes."""
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, k, generator=generator).to(getattr(torch, kind) if kind != "int8" else torch.float32)
    matrix = PackedMatrix(weight, quantize=kind == "int8")
    if kind == "int8":
        numbers, scales = quantize_rows(weight)
        assert float(((numbers * scales.unsqueeze(1)) - weight).abs().max() / weight.abs().max()) < 1 / 127
        weight = numbers * scales.unsqueeze(1)
    x = torch.randn(29, k, generator=generator)
    tolerance = 1e-5 * k**0.5 + 1e-5
    if "vnni" in instruction_set or "bf16" in instruction_set:
        tolerance *= 20 if kind == "int8" else 1  # activations in 16 bits of the largest
    if "bf16" in instruction_set and kind == "bfloat16":
        x = x.bfloat16().float()
    for softcap in (0.0, 15.0):
        whole = apply(matrix, x, softcap)
        assert (whole - apply_twin(weight.float(), x, softcap)).abs().max() < tolerance
        alone = torch.cat([apply(matrix, row.unsqueeze(0), softcap) for row in x])
        assert torch.equal(whole, alone)
        for size in range(2, 20):
            assert torch.equal(whole[:size], apply(matrix, x[:size], softcap)), size
