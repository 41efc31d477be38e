"""A pool too small for its load: sequences are preempted and recomputed, and nobody can tell from the result."""

from __future__ import annotations

import random

import pytest
import torch

from lrt_core.generate import read
from server.engine.request import GenerationRequest
from server.engine.sequence import Status
from tests.engines import make_engine, oracle, request, run
from tests.helpers import VARIANTS, random_ids, tiny_config, tiny_model


def mixed_requests(count: int) -> list[GenerationRequest]:
    """Greedy and sampled, with and without penalties, prompts of 1 to 90 tokens; all want logprobs."""
    rng = random.Random(1)
    kinds = [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_k": 20}, {"presence_penalty": 0.5, "repetition_penalty": 1.2}]
    return [
        request(
            random_ids(rng.choice([1, 2, 15, 16, 17, 40, 90]), seed=number),
            25,
            logprobs=2,
            prompt_logprobs=1,
            seed=number,
            **kinds[number % len(kinds)],
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("prefill", ["window", "sequential"])
@pytest.mark.parametrize("variant", ["layerwise", "shared", "upper-middle-source", "plain"])
def test_tokens_and_logprobs_are_those_of_each_alone(variant: str, prefill: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    engine = make_engine(model, prefill=prefill, max_model_len=120, num_blocks=40, block_size=4)
    requests = mixed_requests(12)
    done = run(engine, requests)
    assert done.total("num_preemptions") > 0
    assert done.total("num_recomputed_tokens") > 0
    for item, [outcome] in zip(requests, done.outcomes, strict=True):
        assert outcome.token_ids == oracle(model, item)
        whole = [*item.prompt_ids, *outcome.token_ids]
        logprobs = torch.log_softmax(read(model, whole).logits, -1)
        expected = [float(logprobs[position, token]) for position, token in enumerate(whole[1:])]
        assert outcome.prompt_logprobs is not None
        assert [entry.token_id for entry in outcome.prompt_logprobs] == list(item.prompt_ids)
        actual = [entry.logprob for entry in (*outcome.prompt_logprobs[1:], *outcome.tokens)]
        assert actual == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("prefill", "num_prompt_rows"), [("window", None), ("window", 4), ("sequential", None)])
def test_a_pool_of_barely_more_than_the_longest_finishes_everyone_in_order_of_rank(
    prefill: str, num_prompt_rows: int | None
) -> None:
    """50 requests that come to up to 60 tokens, on 16 blocks of 4: one long one at a time, or a few short ones."""
    model = tiny_model()
    engine = make_engine(model, prefill=prefill, num_prompt_rows=num_prompt_rows, max_model_len=60, num_blocks=16)
    rng = random.Random(2)
    requests = []
    for number in range(50):
        prompt_len = rng.choice([1, 5, 20, 40, 59])
        max_tokens = min(60 - prompt_len, rng.choice([1, 10, 40]))
        requests.append(request(random_ids(prompt_len, seed=number), max_tokens, priority=rng.randint(0, 2)))
    sequences = [sequence for item in requests for sequence in engine.add(item)]
    by_rank, started, num_preemptions = sorted(sequences, key=lambda sequence: sequence.rank), [], 0
    while engine.has_work():
        waiting = [sequence for sequence in by_rank if not sequence.finished]
        output = engine.step()
        started += output.started
        num_preemptions += output.stats.num_preemptions
        assert waiting[0].finished or waiting[0].status is Status.RUNNING, "the first in rank waits"
    assert started == by_rank, "somebody was served before one of better rank"
    assert num_preemptions > 0
    for item, sequence in zip(requests, sequences, strict=True):
        assert sequence.output_ids == oracle(model, item)
    assert engine.blocks.num_free_blocks == engine.config.num_blocks


def test_a_prompt_preempted_half_read_is_scored_once() -> None:
    """12 blocks of 4: the first sequence's growth takes the second's place while that reads its 36 tokens one by one."""
    model = tiny_model()
    engine = make_engine(model, prefill="sequential", max_model_len=48, num_blocks=12)
    growing, reading = request(random_ids(4), 40), request(random_ids(36, seed=1), 2, prompt_logprobs=0)
    engine.add(growing)
    [sequence] = engine.add(reading)
    while not engine.scheduler.totals.num_preemptions:
        engine.step()
    num_scored = len(sequence.prompt_logprobs)
    assert 0 < num_scored < 35
    assert sequence.num_computed_tokens == 0
    outputs = []
    while engine.has_work():
        outputs += [item for item in engine.step().outputs if item.sequence is sequence]
    entries = outputs[0].prompt_logprobs
    assert entries is not None
    assert [entry.token_id for entry in entries] == list(reading.prompt_ids)
    exact = torch.log_softmax(read(model, reading.prompt_ids).logits, -1)
    expected = [float(exact[position, token]) for position, token in enumerate(reading.prompt_ids[1:])]
    assert [entry.logprob for entry in entries[1:]] == pytest.approx(expected, abs=1e-4)
    assert sequence.output_ids == oracle(model, reading)
