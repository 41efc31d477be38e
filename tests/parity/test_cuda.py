"""The same on a CUDA device as on the CPU. Run where one is: `pytest -m gpu`."""

from __future__ import annotations

import copy

import pytest
import torch

from lrt_core.fused import fuse
from lrt_core.generate import read
from lrt_core.refine import refine
from lrt_core.sampling import SampleRow, sample
from lrt_core.sampling_params import SamplingParams
from server.engine.loader import DEFAULT_TOLERANCE
from tests.engines import make_engine, oracle, request, run
from tests.helpers import VARIANTS, contracting_model, random_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_oracle(variant: str) -> None:
    model, ids = contracting_model(variant), random_ids(50)
    expected, actual = read(model, ids), read(copy.deepcopy(model).cuda(), ids)
    torch.testing.assert_close(actual.logits.cpu(), expected.logits, atol=1e-3, rtol=0)
    torch.testing.assert_close(actual.latents.cpu(), expected.latents, atol=1e-3, rtol=0)


@pytest.mark.parametrize("prefill", ["window", "sequential"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_engine(variant: str, prefill: str) -> None:
    """Fused, batched, preempted, in float32: the CPU oracle's tokens."""
    model = contracting_model(variant)
    engine = make_engine(fuse(copy.deepcopy(model).cuda()), prefill=prefill, max_model_len=100, num_blocks=40)
    requests = [request(random_ids(length, seed=length), max_tokens=12) for length in (1, 2, 15, 40, 41, 70, 80)]
    done = run(engine, requests)
    assert done.total("num_preemptions") > 0
    assert done.token_ids == [oracle(model, item) for item in requests]


def test_refinement() -> None:
    model, tokens = contracting_model(), torch.tensor([random_ids(40)])
    expected, actual = refine(model, tokens, 1e-4), refine(copy.deepcopy(model).cuda(), tokens.cuda(), 1e-4)
    assert len(actual.residuals) == len(expected.residuals)
    torch.testing.assert_close(actual.latents.cpu(), expected.latents, atol=1e-3, rtol=0)


def test_sampling_draws_the_same() -> None:
    logits = 3 * torch.randn(30, 500, generator=torch.Generator().manual_seed(0))
    kinds = [
        SamplingParams(),
        SamplingParams(top_p=0.9, temperature=0.7),
        SamplingParams(top_k=9, min_p=0.01),
        SamplingParams(temperature=0),
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, logit_bias={3: 2.0}, allowed_token_ids=tuple(range(100))),
    ]
    rows = [SampleRow(kinds[i % 5], i, i, (1, 2, 3), (3, 4)) for i in range(30)]
    assert sample(logits.cuda(), rows).tolist() == sample(logits, rows).tolist()


def test_bfloat16() -> None:
    """Within 0.1 nats of float32 on the CPU, as on the CPU itself."""
    model, ids = contracting_model(), random_ids(100)
    rounded = copy.deepcopy(model).cuda()
    for weight in rounded.parameters():
        if weight.ndim >= 2:
            weight.data = weight.data.to(torch.bfloat16)
    engine = make_engine(fuse(rounded), tolerance=DEFAULT_TOLERANCE[torch.bfloat16])
    [[outcome]] = run(engine, [request(ids, 0, prompt_logprobs=0)]).outcomes
    assert outcome.prompt_logprobs is not None
    exact = torch.log_softmax(read(model, ids).logits, -1)
    for position, entry in enumerate(outcome.prompt_logprobs[1:]):
        assert entry.logprob == pytest.approx(float(exact[position, entry.token_id]), abs=0.1)
