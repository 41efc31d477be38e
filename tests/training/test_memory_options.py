"""Recomputing and compiling change no loss and no gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrt_core.model import LatentRecurrentTransformer, Layer
from tests.helpers import VARIANTS, tiny_config, tiny_model
from tests.training.test_refining_schedules import used_gradients
from tests.training.test_schedules import make_rows
from training.schedules import Schedule
from training.schedules.baseline import baseline
from training.schedules.chunked import chunked
from training.schedules.interleaved import interleaved
from training.schedules.multi_refine import multi_refine
from training.trainer import prepare

SCHEDULES = {
    "baseline": baseline,
    "chunked": partial(chunked, chunk_len=5),
    "interleaved": partial(interleaved, num_subsets=3),
    "interleaved_refresh": partial(interleaved, num_subsets=3, kv_refresh=True),
    "multi_refine": multi_refine,
}


# The compiler's own doing, on its way through the model and at its import.
of_the_compiler = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:.*torch.jit.*is deprecated:DeprecationWarning",
)


def make_model(name: str) -> LatentRecurrentTransformer:
    return tiny_model(tiny_config(sequence_len=8, **VARIANTS["plain" if name == "baseline" else "upper-middle-source"]))


def check_the_same(schedule: Schedule, ordinary: LatentRecurrentTransformer, other: LatentRecurrentTransformer) -> None:
    tokens, targets = make_rows(ordinary.config.vocab_size, 12)
    expected, actual = (schedule(model, tokens, targets).total for model in (ordinary, other))
    torch.testing.assert_close(actual, expected)
    wanted = used_gradients(ordinary, expected)
    for name, gradient in used_gradients(other, actual).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", SCHEDULES)
def test_recomputing_gives_the_same_gradients(name: str) -> None:
    recomputing = make_model(name)
    prepare(recomputing, compile=False, recompute=True)
    check_the_same(SCHEDULES[name], make_model(name), recomputing)


def kept_bytes(model: LatentRecurrentTransformer, schedule: Schedule) -> int:
    """What autograd keeps for the backward, each storage counted once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens, targets = make_rows(model.config.vocab_size, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        schedule(model, tokens, targets)
    return sum(kept.values())


@pytest.mark.parametrize("name", SCHEDULES)
def test_recomputing_keeps_less(name: str) -> None:
    ordinary, recomputing = make_model(name), make_model(name)
    prepare(recomputing, compile=False, recompute=True)
    assert kept_bytes(recomputing, SCHEDULES[name]) < 0.6 * kept_bytes(ordinary, SCHEDULES[name])


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_the_first_forward_multiplies_no_zeros() -> None:
    """Layerwise projections would be two products a layer."""
    model = tiny_model()
    tokens, targets = make_rows(model.config.vocab_size, 8)
    counts = []
    for num_refinements in (1, 2):
        with _Products() as products:
            multi_refine(model, tokens, targets, num_refinements=num_refinements)
        counts.append(products.count)
    fed = counts[1] - counts[0]
    assert counts[0] - fed == fed - 2 * model.config.num_layers


@of_the_compiler
@pytest.mark.parametrize("name", ["baseline", "interleaved", "multi_refine"])
def test_compiled_graphs_are_the_same(name: str) -> None:
    """Traced by torch.compile and run without code generation, which the next test adds."""
    compiled = make_model(name)
    for layer in compiled.layers:
        assert isinstance(layer, Layer)
        layer.compile_parts(backend="aot_eager")
    check_the_same(SCHEDULES[name], make_model(name), compiled)


@of_the_compiler
@pytest.mark.slow
def test_generated_code_is_the_same() -> None:
    """One layer without recurrence: C++ is generated and compiled for each shape and part, which takes seconds."""
    config = tiny_config(num_layers=1, **VARIANTS["plain-bare"])
    compiled = tiny_model(config)
    prepare(compiled, compile=True, recompute=False)
    check_the_same(baseline, tiny_model(config), compiled)
