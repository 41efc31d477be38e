"""The native model against the oracle, token by token over a paged pool whose blocks lie out of order."""

from __future__ import annotations

from array import array

import pytest
import torch

from lrt_core import kernels
from lrt_core.generate import read
from lrt_core.kernels.packing import MOST, SPAN, PackedMatrix, quantize_rows, quantize_spans
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
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[1, 5] = bad
        out = apply(matrix, x)
        assert not out[1].isfinite().any()
        assert out[0].isfinite().all() and out[2].isfinite().all()
    x[1, 5] = torch.nan
    assert apply(matrix, x, softcap=15.0)[1].isnan().all()


def spread(x: torch.Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())


@needs_native
@torch.no_grad()
def test_bfloat16_weights_in_whole_numbers_never_overflow(instruction_set: str) -> None:
    """Rows whose sums come to the most they can, and rows of every size: no further from float64 than rounding of weights and
    of activations, of which 128 share 32 bits, can lead."""
    torch.manual_seed(0)
    k = 384
    weight = torch.randn(48, k)
    weight[0], weight[1], weight[2, ::2], weight[3] = 3.0, -3.0, 5.0, 0.0
    weight = weight.bfloat16()
    ones, last = torch.ones(k), torch.zeros(k)
    last[-1] = 1.0
    spiky = torch.randn(k) * 1e-3
    spiky[77] = 40.0
    rows = [ones, -ones, last, spiky, torch.randn(k), ones * 1e30, torch.randn(k) * 1e-30, torch.zeros(k)]
    rows += [weight[i].float() for i in range(3)]
    for total in (2**31 // 2047 - 164, 2**31 // 2047):  # rounded up in 127 places of every span, with the slack and without
        rounded_up = torch.full((3, 128), 8190.51)
        rounded_up[:, 5] = total - 127 * 8190.51
        rows.append(rounded_up.flatten())
    x = torch.stack(rows)
    if "bf16" in instruction_set:
        x = x.bfloat16().float()
    out, exact = apply(PackedMatrix(weight), x).double(), x.double() @ weight.double().T
    x, weights = x.double().abs(), weight.double().abs()
    sums, largest = x.view(-1, 3, SPAN).sum(-1), weights.view(-1, 3, SPAN).amax(-1)
    step = torch.maximum(x.amax(-1) / 32767, sums.amax(-1) / (2**31 / 2047 - 200))
    rounding = sums @ largest.T / 2047 / 2 + torch.outer(step / 2, weights.sum(-1))
    assert bool(((out - exact).abs() <= 1.01 * rounding).all())


@needs_native
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 16), (40, 33), (130, 96), (48, 200), (272, 768), (1040, 20)])
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
    is_whole = kind == "bfloat16" and kernels.has_pairs()
    if is_whole:
        numbers, scales = quantize_spans(weight)
        rounded = numbers * scales.repeat_interleave(SPAN, dim=1)[:, :k]
        assert spread(rounded - weight.float()) < 5e-4 * spread(weight.float())  # bfloat16's own: 1.5e-3
        largest = weight.float().abs().amax()
        assert int(numbers.abs().max()) == MOST
        assert float((rounded - weight.float()).abs().max()) <= largest / (2 * MOST) * 1.001
        assert torch.equal(PackedMatrix(weight.T.contiguous().T).data, matrix.data)
        weight = rounded
    x = torch.randn(150, k, generator=generator)  # more than any set unpacks weights for at once
    tolerance = 1e-5 * k**0.5 + 1e-5
    if is_whole:
        tolerance *= 20  # activations of which 128 must be summed in 32 bits
    if kind == "int8" and (kernels.has_bytes() or kernels.has_pairs()):
        tolerance *= 20  # activations in 16 bits of the largest
    if "bf16" in instruction_set and kind == "bfloat16":
        x = x.bfloat16().float()
    for softcap in (0.0, 15.0):
        whole = apply(matrix, x, softcap)
        assert (whole - apply_twin(weight.float(), x, softcap)).abs().max() < tolerance
        alone = torch.cat([apply(matrix, row.unsqueeze(0), softcap) for row in x])
        assert torch.equal(whole, alone)
        for size in (*range(2, 20), 29, 67, 89, 133):
            assert torch.equal(whole[:size], apply(matrix, x[:size], softcap)), size
