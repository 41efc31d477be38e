"""With sequential reading every state is a function of its tokens alone: logprobs are bit-equal alone, in any batch, in random
traffic, after hits, forks and preemption, in both types and in int8."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lrt_core import kernels
from lrt_core.generate import read
from lrt_core.kernels.packing import quantize_rows
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.native_model import Quantization
from server.engine.engine import Engine
from server.engine.loader import LoadError, LoadOptions, load_engine, serving_model
from server.engine.model_runner import ModelRunner
from server.engine.request import GenerationRequest
from tests.engines import Outcome, engine_config, oracle, request, run
from tests.helpers import VARIANTS, contracting_model, random_ids, tiny_config

needs_native = pytest.mark.skipif(not kernels.is_native(), reason="the package's build found no C++ compiler")
KINDS = ["float32", "bfloat16", "int8", "int8-memory"]
FORMS: list[Quantization] = ["int8", "int8-memory"]


def make(model: LatentRecurrentTransformer, kind: str, **overrides: Any) -> Engine:
    config = engine_config(**{"prefill": "sequential", **overrides})
    form = next((form for form in FORMS if form == kind), "none")
    served = serving_model(model, config.max_model_len, form)
    return Engine(ModelRunner(served, config), (), check_invariants=True, seed=0)


def entries(outcome: Outcome) -> list[tuple[int, float | None]]:
    return [(token.token_id, token.logprob) for token in [*(outcome.prompt_logprobs or ()), *outcome.tokens]]


def requests(count: int) -> list[GenerationRequest]:
    rng, stem = random.Random(5), random_ids(40)
    return [
        request(
            [*stem[: rng.choice([0, 9, 24])], *random_ids(rng.randint(1, 30), number)],
            rng.randint(1, 10),
            n=1 + number % 2,
            logprobs=0,
            prompt_logprobs=0 if number % 3 == 0 else None,
            temperature=float(number % 2),
            seed=number,
        )
        for number in range(count)
    ]


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["layerwise", "upper-middle-source", "plain"])
def test_logprobs_are_bit_equal_whatever_else_runs(variant: str, kind: str) -> None:
    model = contracting_model(variant)
    if kind == "bfloat16":
        for weight in model.parameters():
            weight.data = weight.data.to(torch.bfloat16) if weight.ndim > 1 else weight.data
    wanted = requests(12)
    alone = [run(make(model, kind, prefix_caching=False), [item]).outcomes[0] for item in wanted]
    arrangements = {
        "together": {},
        "in a small pool": {"num_blocks": 22, "max_model_len": 80},
        "a few at a time": {"max_num_seqs": 2},
    }
    for name, sizes in arrangements.items():
        engine = make(model, kind, **sizes)
        for traffic in (None, random.Random(4)):  # the second time from what the first left in the cache
            done = run(engine, wanted, traffic)
            for own, other in zip(alone, done.outcomes, strict=True):
                assert [entries(sample) for sample in own] == [entries(sample) for sample in other], name
        assert name != "in a small pool" or engine.scheduler.totals.num_preemptions > 0
        assert engine.scheduler.totals.num_prefix_hits > 0


@needs_native
@pytest.mark.parametrize("prefill", ["window", "sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_bit_equal_on_any_number_of_threads(kind: str, prefill: str) -> None:
    model, wanted = contracting_model("upper-middle-source"), requests(6)
    if kind == "bfloat16":
        for weight in model.parameters():
            weight.data = weight.data.to(torch.bfloat16) if weight.ndim > 1 else weight.data
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        try:
            done = run(make(model, kind, prefill=prefill, num_blocks=40, max_model_len=80), wanted)
        finally:
            torch.set_num_threads(1)
        found.append([[entries(sample) for sample in samples] for samples in done.outcomes])
    assert found[0] == found[1] == found[2]


def test_the_loader_reads_sequentially_and_refuses_what_torch_cannot_promise(checkpoint: Path) -> None:
    options = LoadOptions(checkpoint, dtype="float32", deterministic=True)
    if kernels.is_native():
        assert load_engine(options).config.prefill == "sequential"
    with kernels.native(False), pytest.raises(LoadError, match="--deterministic needs the native kernels"):
        load_engine(options)


def rounded(model: LatentRecurrentTransformer, form: Quantization) -> LatentRecurrentTransformer:
    """The model with the weights of all products or of memory projections in 8 bits, a scale per output, as float32."""
    twin = copy.deepcopy(model)
    for name, weight in twin.named_parameters():
        if weight.ndim == 2 and "embedding" not in name and (form == "int8" or "memory_projection" in name):
            numbers, scales = quantize_rows(weight.detach())
            weight.data = numbers.float() * scales.unsqueeze(1)
    return twin


def int8_sets() -> dict[str, float]:
    """The processor's best instruction set for each way to multiply, with what its logprobs may stray: bytes and pairs, whose
    activations are rounded, and float32."""
    found: dict[tuple[bool, bool], str] = {}
    for name in reversed(kernels.instruction_sets()):
        with kernels.using_instruction_set(name):
            found[kernels.has_bytes(), kernels.has_bytes() or kernels.has_pairs()] = name
    return {name: 1e-3 if is_rounded else 1e-4 for (_, is_rounded), name in found.items()}


@needs_native
@pytest.mark.parametrize("prefill", ["window", "sequential"])
@pytest.mark.parametrize(
    ("variant", "form"),
    [
        (variant, form)
        for variant in VARIANTS
        for form in FORMS
        if form == "int8" or tiny_config(**VARIANTS[variant]).kv_projection
    ],
)
def test_int8_is_the_oracle_on_rounded_weights(variant: str, form: Quantization, prefill: str) -> None:
    model = contracting_model(variant)
    item = request(random_ids(30), 12, prompt_logprobs=0, logprobs=0)
    for name, tolerance in int8_sets().items():
        with kernels.using_instruction_set(name):
            [[outcome]] = run(make(model, form, prefill=prefill), [item]).outcomes
        compare_with_rounded(model, rounded(model, form), item, outcome, tolerance)


def compare_with_rounded(
    model: LatentRecurrentTransformer,
    twin: LatentRecurrentTransformer,
    item: GenerationRequest,
    outcome: Outcome,
    tolerance: float,
) -> None:
    """Ids and logprobs of an int8 engine against the oracle on the rounded weights (twin) and on the full ones."""
    ids = [*item.prompt_ids, *outcome.token_ids]
    assert outcome.token_ids == oracle(twin, item)
    exact = torch.log_softmax(read(twin, ids).logits, -1)
    expected = [float(exact[position, token]) for position, token in enumerate(ids[1:])]
    assert [logprob for _, logprob in entries(outcome)[1:]] == pytest.approx(expected, abs=tolerance)
    full = torch.log_softmax(read(model, ids).logits, -1)
    assert 0 < max(abs(float(full[p, token]) - expected[p]) for p, token in enumerate(ids[1:])) < 0.3, "near, not the same"
