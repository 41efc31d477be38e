"""Several samples of one prompt: it is read once, and what they share is copied before anyone writes to it."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import pytest
import torch

from server.engine.block_manager import Copy
from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner, WindowResult
from server.engine.request import GenerationRequest
from server.engine.scheduler import ScheduledWindow
from server.engine.sequence import Sequence, Status
from tests.engines import Outcome, make_engine, oracle, request, run
from tests.helpers import VARIANTS, contracting_model, random_ids, tiny_config, tiny_model

PLAIN = tiny_model(tiny_config(**VARIANTS["plain"]))
MODEL = contracting_model()


def sampled(num_prompt_tokens: int, max_tokens: int, n: int, **values: object) -> GenerationRequest:
    return request(random_ids(num_prompt_tokens), max_tokens, n=n, temperature=1.0, seed=40, **values)


def alone(model: torch.nn.Module, item: GenerationRequest) -> list[list[int]]:
    """What each sample is to come to."""
    return [
        oracle(model, request(item.prompt_ids, item.stopping.max_tokens, temperature=1.0, seed=40 + index))
        for index in range(item.n)
    ]


def ids_of(samples: list[Outcome]) -> list[list[int]]:
    return [sample.token_ids for sample in samples]


def finish_all(engine: Engine) -> dict[Sequence, list[int]]:
    """Step until nothing is left; the tokens that came out for each sequence."""
    tokens: dict[Sequence, list[int]] = {}
    while engine.has_work():
        for output in engine.step().outputs:
            own = tokens.setdefault(output.sequence, [])
            own += [output.token.token_id] if output.token is not None else []
    assert engine.blocks.num_free_blocks == engine.config.num_blocks
    return tokens


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[list[Copy]]:
    """The copies of every step."""
    steps: list[list[Copy]] = []
    execute = ModelRunner.execute

    def noted(self: ModelRunner, windows: SequenceABC[ScheduledWindow], copies: SequenceABC[Copy] = ()) -> list[WindowResult]:
        steps.append(list(copies))
        return execute(self, windows, copies)

    monkeypatch.setattr(ModelRunner, "execute", noted)
    return steps


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_the_prompt_is_read_once(prefix_caching: bool) -> None:
    item = sampled(40, 5, n=3)
    done = run(make_engine(PLAIN, prefix_caching=prefix_caching), [item])
    assert [step.num_scheduled_tokens for step in done.steps] == [16, 16, 8, 3, 3, 3, 3]
    assert done.total("num_settled_prompt_tokens") == 40
    assert len(done.all_of("refinement_passes")) == 1
    assert ids_of(done.outcomes[0]) == alone(PLAIN, item)


def test_held_samples_take_no_place() -> None:
    engine = make_engine(PLAIN)
    sequences = engine.add(sampled(40, 5, n=3))
    stats = engine.step().stats
    assert [sequence.status for sequence in sequences] == [Status.RUNNING, Status.HELD, Status.HELD]
    assert (stats.num_running, stats.kv_cache_usage) == (1, 10 / 320)
    engine.step()
    engine.step()
    assert [sequence.status for sequence in sequences] == [Status.RUNNING] * 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_unfinished_block_is_copied_with_its_latents(variant: str, copies: list[list[Copy]]) -> None:
    """6 tokens in blocks of 4: the first block stays common, of the second two samples get copies and the last keeps it."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    engine, item = make_engine(model, prefill="sequential"), sampled(6, 4, n=3)
    sequences = engine.add(item)
    for _ in range(6):
        engine.step()
    shared = sequences[0].block_table[1]
    assert [sequence.block_table for sequence in sequences] == [sequences[0].block_table] * 3
    engine.step()
    assert [len(step) for step in copies] == [0] * 6 + [2]
    tables = [sequence.block_table for sequence in sequences]
    assert len({table[0] for table in tables}) == 1
    assert len({table[1] for table in tables}) == 3
    assert tables[2][1] == shared
    assert [(copy.source, copy.target) for copy in copies[6]] == [(shared, tables[0][1]), (shared, tables[1][1])]
    pool = engine.runner.pool
    for storage in (*pool.keys, *pool.values, pool.latents):
        prompt_part = [storage[table[1] * 4 : table[1] * 4 + 2] for table in tables]
        assert prompt_part[0].any()
        assert torch.equal(prompt_part[0], prompt_part[1])
        assert torch.equal(prompt_part[0], prompt_part[2])
    finish_all(engine)
    assert [sequence.output_ids for sequence in sequences] == alone(model, item)


def test_nothing_is_copied_at_a_block_s_border(copies: list[list[Copy]]) -> None:
    item = sampled(8, 4, n=3)
    done = run(make_engine(PLAIN), [item])
    assert not any(copies)
    assert ids_of(done.outcomes[0]) == alone(PLAIN, item)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_the_next_reads_on_when_the_first_is_aborted(num_steps: int) -> None:
    engine, item = make_engine(PLAIN), sampled(40, 5, n=3)
    first, second, third = engine.add(item)
    for _ in range(num_steps):
        engine.step()
    engine.finish(first, "abort")
    assert (second.status, third.status) == (Status.WAITING, Status.HELD)
    tokens = finish_all(engine)
    assert first not in tokens
    assert [tokens[second], tokens[third]] == alone(PLAIN, item)[1:]
    assert second.num_cached_prompt_tokens == third.num_cached_prompt_tokens == 16 * num_steps, "what was read is found"


def test_a_sample_aborted_while_held_is_not_drawn() -> None:
    engine, item = make_engine(PLAIN), sampled(40, 5, n=4)
    sequences = engine.add(item)
    engine.step()
    engine.finish(sequences[1], "abort")
    engine.finish(sequences[3], "abort")
    assert engine.blocks.usage > 0, "the others go on"
    tokens = finish_all(engine)
    expected = alone(PLAIN, item)
    assert tokens == {sequences[0]: expected[0], sequences[2]: expected[2]}


def test_aborting_all_leaves_nothing() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        engine = make_engine(PLAIN)
        sequences = engine.add(sampled(40, 5, n=3))
        engine.step()
        for index in order:
            engine.finish(sequences[index], "abort")
        assert not engine.has_work()
        assert engine.blocks.usage == 0


@pytest.mark.parametrize("model", [PLAIN, MODEL], ids=["plain", "recurrent"])
def test_without_a_place_beside_it_a_sample_waits_and_finds_the_prompt_cached(model: torch.nn.Module) -> None:
    engine, item = make_engine(model, max_num_seqs=2), sampled(42, 5, n=5, prompt_logprobs=0, logprobs=0)
    done = run(engine, [item])
    assert max(step.num_running for step in done.steps) == 2
    assert max(step.num_waiting for step in done.steps) == 3
    assert ids_of(done.outcomes[0]) == alone(model, item)
    assert (done.total("num_prefix_queries"), done.total("num_prefix_hits")) == (42, 0), "one newcomer, and nothing was there"
    assert done.total("num_recomputed_tokens") == done.total("num_preemptions") == 0
    assert done.total("num_settled_prompt_tokens") == 42
    for sample in done.outcomes[0]:
        assert sample.prompt_logprobs == done.outcomes[0][0].prompt_logprobs
        assert sample.prompt_logprobs is not None
        assert len(sample.prompt_logprobs) == 42
    if model is PLAIN:
        assert done.total("num_scheduled_tokens") == 42 + 5 * 4 + 3 * 2, "the waiting ones read 2 tokens behind the last block"


def test_without_blocks_for_all_the_last_ones_give_way() -> None:
    engine, item = make_engine(PLAIN, max_model_len=48, num_blocks=13), sampled(22, 20, n=4)
    done = run(engine, [item])
    assert done.total("num_preemptions") > 0
    assert ids_of(done.outcomes[0]) == alone(PLAIN, item)


@pytest.mark.parametrize("n", [1, 3])
def test_scoring_alone_serves_every_sample(n: int) -> None:
    done = run(make_engine(MODEL), [request(random_ids(20), 0, n=n, prompt_logprobs=1)])
    [samples] = done.outcomes
    assert len(samples) == n
    for sample in samples:
        assert (sample.tokens, sample.finish_reason) == ([], "length")
        assert sample.prompt_logprobs is not None
        assert [entry.token_id for entry in sample.prompt_logprobs] == random_ids(20)
        assert sample.prompt_logprobs == samples[0].prompt_logprobs
    assert done.total("num_settled_prompt_tokens") == 20


def test_one_token_each() -> None:
    item = sampled(10, 1, n=3)
    done = run(make_engine(PLAIN), [item])
    assert ids_of(done.outcomes[0]) == alone(PLAIN, item)
    assert done.total("num_scheduled_tokens") == 10


@pytest.mark.parametrize("ender", [0, 1, 2])
def test_an_end_with_the_first_token_ends_that_sample_alone(ender: int) -> None:
    item = sampled(10, 6, n=3)
    free = alone(PLAIN, item)
    eos = free[ender][0]
    expected = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in free]
    assert len(expected[ender]) == 1
    assert sum(len(ids) for ids in expected) > 3
    done = run(make_engine(PLAIN, eos_ids=[eos]), [item])
    assert ids_of(done.outcomes[0]) == expected
    reasons = [sample.finish_reason for sample in done.outcomes[0]]
    assert reasons == ["stop" if eos in ids else "length" for ids in free]


def test_samples_get_what_their_request_asked_for() -> None:
    [samples] = run(make_engine(MODEL), [sampled(10, 3, n=2, logprobs=2, repetition_penalty=1.3)]).outcomes
    for index, sample in enumerate(samples):
        lone = request(random_ids(10), 3, temperature=1.0, seed=40 + index, repetition_penalty=1.3)
        assert sample.token_ids == oracle(MODEL, lone)
        assert [len(token.top) for token in sample.tokens] == [2] * 3
        assert all(token.logprob is not None for token in sample.tokens)
