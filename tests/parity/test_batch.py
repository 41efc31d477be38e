"""64 requests at once against each alone: requests do not see each other."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest

from server.engine.async_engine import AsyncEngine
from server.engine.request import GenerationRequest
from tests.engines import make_engine, request, run
from tests.helpers import contracting_model, random_ids, tiny_tokenizer

NUM_REQUESTS = 64
SIZES: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 256, "window": 64, "num_blocks": 2400}


def mixed_requests(**sampling: Any) -> list[GenerationRequest]:
    """Prompts of 1 to 120 tokens, outputs of 1 to 16."""
    rng = random.Random(2)
    return [
        request(
            random_ids(rng.randint(1, 120) if number else 1, number), rng.randint(1, 16), seed=number, logprobs=0, **sampling
        )
        for number in range(NUM_REQUESTS)
    ]


async def stream_all(engine: AsyncEngine, requests: list[GenerationRequest]) -> list[list[tuple[int, float]]]:
    """Tokens and logprobs of every request, all streaming at once."""

    async def consume(item: GenerationRequest) -> list[tuple[int, float]]:
        return [
            (entry.token_id, entry.logprob)
            async for delta in engine.admit(item)
            for entry in delta.logprobs
            if entry.logprob is not None
        ]

    await engine.start()
    results = await asyncio.gather(*(consume(item) for item in requests))
    await engine.stop()
    return list(results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "sampling"),
    [("layerwise", {}), ("shared", {}), ("plain", {}), ("layerwise", {"temperature": 1.0, "top_p": 0.95})],
    ids=["layerwise-greedy", "shared-greedy", "plain-greedy", "layerwise-sampled"],
)
def test_together_as_alone(variant: str, sampling: dict[str, Any]) -> None:
    model = contracting_model(variant)
    requests = mixed_requests(**sampling)
    core = make_engine(model, **SIZES)
    together = asyncio.run(stream_all(AsyncEngine(core, tiny_tokenizer()), requests))
    assert core.blocks.num_free_blocks == core.config.num_blocks
    lone = make_engine(model, **SIZES)
    for number, (item, entries) in enumerate(zip(requests, together, strict=True)):
        [[outcome]] = run(lone, [item]).outcomes
        assert [token for token, _ in entries] == outcome.token_ids, number
        assert [logprob for _, logprob in entries] == pytest.approx([t.logprob for t in outcome.tokens], abs=1e-4)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02}])
def test_tokens_are_the_same_drawn_by_the_step_and_from_logits_that_somebody_wants(sampling: dict[str, Any]) -> None:
    """A request that wants no logprobs, alone, beside others that do for a while, and wanting them itself."""
    model, sampling = contracting_model("layerwise"), {"seed": 11, **sampling}
    plain = request(random_ids(20), 24, **sampling)
    [alone] = run(make_engine(model), [plain]).token_ids
    beside = [request(random_ids(5, seed), 3 + 4 * seed, logprobs=1, temperature=1.0, seed=seed) for seed in range(3)]
    assert run(make_engine(model), [plain, *beside]).token_ids[0] == alone
    [scored] = run(make_engine(model), [replace(plain, logprobs=0)]).token_ids
    assert scored == alone
    [several] = run(make_engine(model), [replace(plain, n=3)]).outcomes
    assert several[0].token_ids == alone, "the first of several samples has the request's own seed"
