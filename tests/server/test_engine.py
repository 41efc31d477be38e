"""The synchronous engine: ends, counts, logprobs, refusals. Whether its tokens are right is `tests/parity`'s business."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lrt_core.generate import read
from lrt_core.kernels import native
from server.engine.engine import NOT_FINITE, Engine
from server.engine.request import PromptTooLongError, RequestError
from tests.engines import engine_config, make_engine, oracle, request, run
from tests.helpers import TINY_VOCAB_SIZE, VARIANTS, contracting_model, random_ids, tiny_config, tiny_model


def test_length_ends_a_sequence() -> None:
    [[outcome]] = run(make_engine(), [request([1, 2, 3], max_tokens=5)]).outcomes
    assert len(outcome.tokens) == 5
    assert outcome.finish_reason == "length"
    assert outcome.prompt_logprobs is None
    assert all(token.logprob is None and token.top == () for token in outcome.tokens)


def test_end_of_sequence_is_delivered_and_ends_it() -> None:
    model = tiny_model()
    free = oracle(model, request([1, 2, 3], max_tokens=8))
    eos = free[4]
    [[ended], [ignored]] = run(
        make_engine(model, eos_ids=[eos]), [request([1, 2, 3], 8), request([1, 2, 3], 8, ignore_eos=True)]
    ).outcomes
    assert ended.token_ids == free[: free.index(eos) + 1]
    assert ended.finish_reason == "stop"
    assert ignored.token_ids == free
    assert ignored.finish_reason == "length"


@pytest.mark.parametrize("prefill", ["window", "sequential"])
@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 40])
def test_prompt_logprobs_score_every_prompt_token(prefill: str, num_prompt_tokens: int) -> None:
    model, ids = contracting_model(), random_ids(num_prompt_tokens)
    engine = make_engine(model, prefill=prefill)
    [[outcome], [nothing_generated]] = run(
        engine, [request(ids, 3, prompt_logprobs=2), request(ids, 0, prompt_logprobs=2)]
    ).outcomes
    exact = torch.log_softmax(read(model, ids).logits, -1)
    for entries in (outcome.prompt_logprobs, nothing_generated.prompt_logprobs):
        assert entries is not None
        assert [entry.token_id for entry in entries] == ids
        assert (entries[0].logprob, entries[0].top) == (None, ())
        for position, entry in enumerate(entries[1:]):
            assert entry.logprob == pytest.approx(float(exact[position, entry.token_id]), abs=1e-4)
            assert [token for token, _ in entry.top] == exact[position].topk(2).indices.tolist()
    assert nothing_generated.tokens == []
    assert nothing_generated.finish_reason == "length"


def test_a_sampled_tokens_logprob_is_its_entry_among_the_top_ones() -> None:
    [[outcome]] = run(make_engine(), [request([1, 2], 10, logprobs=20, temperature=1.0, seed=3)]).outcomes
    for token in outcome.tokens:
        tops = dict(token.top)
        if token.token_id in tops:
            assert tops[token.token_id] == token.logprob
    assert any(token.token_id in dict(token.top) for token in outcome.tokens)


def test_sample_i_has_seed_plus_i() -> None:
    prompt = random_ids(20)
    [together] = run(make_engine(), [request(prompt, 12, n=3, temperature=1.0, seed=40)]).outcomes
    alone = run(make_engine(), [request(prompt, 12, temperature=1.0, seed=40 + i) for i in range(3)])
    assert [sample.token_ids for sample in together] == alone.token_ids
    assert len({tuple(ids) for ids in alone.token_ids}) == 3


def test_without_a_seed_requests_differ_and_the_engines_seed_repeats() -> None:
    item = request(random_ids(5), 12, temperature=1.0)
    first, second = run(make_engine(), [item, item]).token_ids
    assert first != second
    assert run(make_engine(), [item, item]).token_ids == [first, second]


def test_penalties_see_prompt_and_output() -> None:
    model, prompt = tiny_model(), random_ids(10)
    item = request(prompt, 20, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3)
    assert run(make_engine(model), [item]).token_ids == [oracle(model, item)]


def test_counts_of_a_lone_request_are_exact() -> None:
    """40 tokens in windows of 16, each settled at once (plain model): 16 + 16 + 8 rows, then 4 decodes."""
    engine = make_engine(tiny_model(tiny_config(**VARIANTS["plain"])))
    done = run(engine, [request(random_ids(40), max_tokens=5)])
    assert [step.num_scheduled_tokens for step in done.steps] == [16, 16, 8, 1, 1, 1, 1]
    assert [step.num_settled_prompt_tokens for step in done.steps] == [16, 16, 8, 0, 0, 0, 0]
    assert [step.num_running for step in done.steps] == [1] * 6 + [0]
    assert done.all_of("refinement_passes") == [1.0]
    assert done.all_of("refinement_residuals") == []
    assert done.total("num_preemptions") == done.total("num_recomputed_tokens") == 0
    assert [round(step.kv_cache_usage * 320) for step in done.steps] == [10, 10, 10, 11, 11, 11, 0]
    assert all(step.step_seconds > 0 for step in done.steps)


def test_refinement_is_counted_in_rows_per_prompt_token() -> None:
    done = run(make_engine(contracting_model(), tolerance=1e-4), [request(random_ids(40), max_tokens=1)])
    rows, [passes] = done.total("num_scheduled_tokens"), done.all_of("refinement_passes")
    assert passes == pytest.approx(rows / 40)
    assert 1 < passes < 16
    assert len(done.all_of("refinement_residuals")) == sum(step.num_scheduled_tokens > 1 for step in done.steps)
    assert done.total("num_settled_prompt_tokens") == 40


def test_sequential_reading_spends_one_row_a_token() -> None:
    done = run(make_engine(prefill="sequential"), [request(random_ids(9), max_tokens=3)])
    assert [step.num_scheduled_tokens for step in done.steps] == [1] * 11
    assert done.all_of("refinement_passes") == [1.0]


def test_waiting_and_running_are_reported() -> None:
    engine = make_engine(max_num_seqs=2)
    for _ in range(5):
        engine.add(request([1, 2], max_tokens=3))
    stats = engine.step().stats
    assert (stats.num_running, stats.num_waiting) == (2, 3)


def test_ending_from_outside_frees_within_the_call() -> None:
    engine = make_engine()
    [sequence] = engine.add(request(random_ids(30), max_tokens=50))
    engine.step()
    assert engine.blocks.usage > 0
    assert sequence.first_scheduled is not None
    engine.finish(sequence, "abort")
    engine.finish(sequence, "stop")
    assert engine.blocks.usage == 0
    assert not engine.has_work()
    assert sequence.finish_reason == "abort"


def test_a_step_with_nothing_to_do() -> None:
    output = make_engine().step()
    assert output.outputs == []
    assert (output.stats.step_seconds, output.stats.num_scheduled_tokens) == (0.0, 0)


def test_the_last_token_may_fill_the_model_length_and_the_pool() -> None:
    engine = make_engine(max_model_len=40, num_blocks=10)
    [[outcome]] = run(engine, [request(random_ids(30), max_tokens=10)]).outcomes
    assert len(outcome.tokens) == 10


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"prompt_ids": []}, RequestError, "prompt is empty"),
        ({"prompt_ids": [1, TINY_VOCAB_SIZE]}, RequestError, f"token id {TINY_VOCAB_SIZE} lies outside"),
        ({"prompt_ids": [-1]}, RequestError, "token id -1 lies outside"),
        ({"max_tokens": -1}, RequestError, "max_tokens"),
        ({"n": 0}, RequestError, "n at least 1"),
        ({"n": 2000}, RequestError, "n is 2000"),
        ({"logit_bias": {TINY_VOCAB_SIZE: 1.0}}, RequestError, f"token id {TINY_VOCAB_SIZE} lies outside"),
        ({"logit_bias": {-2: 1.0}}, RequestError, "token id -2 lies outside"),
        ({"allowed_token_ids": (0, 10**6)}, RequestError, "token id 1000000 lies outside"),
        ({"max_tokens": 157}, PromptTooLongError, "^This model's maximum context length is 160 tokens.* 161 tokens"),
        ({"max_tokens": 100}, RequestError, "needs 104 tokens of cache, the server has 80"),
    ],
)
def test_what_can_never_be_served_is_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    engine = make_engine(num_blocks=20)
    item = request(**{"prompt_ids": [1, 2, 3, 4], **values})
    for refuse in (engine.check, engine.add):
        with pytest.raises(error, match=message):
            refuse(item)
    assert not engine.has_work()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_model_len": 0}, "max_model_len"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"block_size": 0}, "block_size"),
        ({"window": 0}, "window"),
        ({"max_num_seqs": 65}, "every running sequence needs a token a step"),
        ({"max_num_waiting": -1}, "max_num_waiting"),
        ({"tolerance": -1e-3}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
    ],
)
def test_impossible_configurations(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_config(**overrides)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("variant", ["layerwise", "upper-middle-source", "plain"])
def test_states_that_are_no_numbers_end_their_samples_and_are_not_kept(variant: str, is_native: bool) -> None:
    """A model overflows although its weights are finite."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    with torch.no_grad():
        model.get_submodule("layers.0.mlp.up").weight[0] = 1e30  # type: ignore[index,operator]
    with native(is_native):
        engine = make_engine(model)
        broken = [request([3, 5, 9, 2] * 4, 6, n=2), request([3, 5, 9, 2] * 4, 6)]
        samples = [sequence for item in broken for sequence in engine.add(item)]
        ended = {}
        while engine.has_work():
            ended |= {item.sequence: (item.finish_reason, item.error, item.token) for item in engine.step().outputs}
        assert ended == {sequence: ("abort", NOT_FINITE, None) for sequence in samples}
        assert engine.blocks.num_free_blocks == engine.config.num_blocks
        assert engine.scheduler.totals.num_prefix_hits == 0, "nothing of it is found again"
        pool = engine.runner.pool
        assert all(bool(part.isfinite().all()) for part in (pool.keys, pool.values, pool.latents)), "nor read in passing"


def test_invariants_are_checked_when_asked() -> None:
    engine: Engine = make_engine()
    [sequence] = engine.add(request([1, 2, 3]))
    engine.step()
    sequence.block_table.append(sequence.block_table[0])
    with pytest.raises(AssertionError, match="block"):
        engine.step()
