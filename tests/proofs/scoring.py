"""Generated sequences, scored again as prompts, get the logprobs they were generated with; and requests do not see each other.

The bound in bfloat16: a settled memory may be wrong by the tolerance, relatively, and a logit moves by about as much of its
spread; over the tiny models' logits that stays below ten tolerances.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from lrt_core.model import LatentRecurrentTransformer
from server.engine.engine import Engine
from server.engine.loader import DEFAULT_TOLERANCE, prompt_rows, serving_model
from server.engine.model_runner import ModelRunner
from server.engine.request import GenerationRequest
from tests.engines import Outcome, engine_config, request, run
from tests.helpers import contracting_model, random_ids

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 10 * DEFAULT_TOLERANCE[torch.bfloat16]}

SCORED = ["layerwise", "upper-middle-source"]
"""Variants: what the last layer makes is the memory, and so what a cached token is scored by; or what a lower one makes is."""


@dataclass(frozen=True)
class Consistency:
    """Largest difference of a logprob between generating and scoring, by how the state came about; counts that show it did."""

    cold: float
    cached: float
    forked: float
    preempted: float
    num_hits: int
    num_preemptions: int


def model_of(dtype: torch.dtype, variant: str = "layerwise") -> LatentRecurrentTransformer:
    """A contracting tiny model whose matrices are in `dtype`."""
    model = contracting_model(variant).requires_grad_(False)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype) if weight.ndim > 1 else weight.data
    return model


def engine_of(model: LatentRecurrentTransformer, **sizes: object) -> Engine:
    """As the loader makes it, with invariants checked."""
    values: dict[str, object] = {"tolerance": DEFAULT_TOLERANCE[model.dtype]}
    values["num_prompt_rows"] = prompt_rows(engine_config().window, model.config, "cpu")
    config = engine_config(**{**values, **sizes})
    return Engine(ModelRunner(serving_model(model, config.max_model_len), config), (), check_invariants=True, seed=0)


def _wanted(count: int, n: int = 1) -> list[GenerationRequest]:
    """Sampled requests with prompts of 1 to 60 tokens, a third of which begin alike."""
    rng, stem = random.Random(11), random_ids(32)
    return [
        request(
            [*(stem if number % 3 == 0 else ()), *random_ids(rng.randint(1, 28), number)],
            rng.randint(4, 24),
            n=n,
            logprobs=0,
            temperature=1.0,
            seed=number,
        )
        for number in range(count)
    ]


def _worst(engine: Engine, wanted: list[GenerationRequest], outcomes: list[list[Outcome]]) -> float:
    """Largest difference between the logprobs of generated tokens and those that `engine` gives them as prompts."""
    pairs = [(item, sample) for item, samples in zip(wanted, outcomes, strict=True) for sample in samples]
    scored = run(engine, [request([*item.prompt_ids, *sample.token_ids], 0, prompt_logprobs=0) for item, sample in pairs])
    worst = 0.0
    for (item, sample), [again] in zip(pairs, scored.outcomes, strict=True):
        assert again.prompt_logprobs is not None
        for own, other in zip(sample.tokens, again.prompt_logprobs[len(item.prompt_ids) :], strict=True):
            assert own.token_id == other.token_id and own.logprob is not None and other.logprob is not None
            worst = max(worst, abs(own.logprob - other.logprob))
    return worst


def self_consistency(count: int, dtype: torch.dtype, variant: str) -> Consistency:
    """`count` generated sequences a way, scored again as prompts. variant: of the tiny models."""
    model, wanted = model_of(dtype, variant), _wanted(count)
    cold = engine_of(model, prefix_caching=False)
    done = run(cold, wanted)
    caching = engine_of(model, num_blocks=max(320, 40 * count))
    cached = run(caching, wanted)
    worst_cached = _worst(caching, wanted, cached.outcomes)
    forks = _wanted(-(-count // 3), n=3)
    small = engine_of(model, num_blocks=44)
    pressed = run(small, wanted)
    return Consistency(
        cold=_worst(cold, wanted, done.outcomes),
        cached=worst_cached,
        forked=_worst(cold, forks, run(caching, forks).outcomes),
        preempted=_worst(cold, wanted, pressed.outcomes),
        num_hits=caching.scheduler.totals.num_prefix_hits,
        num_preemptions=pressed.total("num_preemptions"),
    )


def count_differing(count: int, **sampling: float) -> int:
    """Of `count` float32 requests, how many give other ids in fixed batches or in random traffic than alone."""
    model = model_of(torch.float32)
    wanted = [
        request(random_ids(random.Random(number).randint(1, 90), number), 1 + number % 16, seed=number, **sampling)
        for number in range(count)
    ]
    alone = [run(engine_of(model), [item]).token_ids[0] for item in wanted]
    batches = [ids for start in range(0, count, 8) for ids in run(engine_of(model), wanted[start : start + 8]).token_ids]
    traffic = run(engine_of(model, num_blocks=60, max_num_seqs=7), wanted, random.Random(3)).token_ids
    return sum(not (a == b == c) for a, b, c in zip(alone, batches, traffic, strict=True))
