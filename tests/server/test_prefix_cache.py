"""Settled full blocks are found again by what shaped them, oldest forgotten first, and results do not show it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from lrt_core.generate import read
from server.engine.block_manager import BlockManager
from server.engine.engine import SequenceOutput
from server.engine.sequence import Sequence
from tests.engines import Outcome, make_engine, oracle, request, run
from tests.helpers import VARIANTS, random_ids, tiny_config, tiny_model
from tests.server.async_bench import Bench, collect
from tests.server.async_bench import run as run_async

SIZE = 4


def new_blocks(num_blocks: int = 20) -> BlockManager:
    return BlockManager(num_blocks, SIZE, "root")


def new_sequence(ids: Iterable[int], salt: str | None = None) -> Sequence:
    return Sequence(request(ids, cache_salt=salt), 0, 0)


def place(blocks: BlockManager, ids: Iterable[int], salt: str | None = None, settled: int | None = None) -> Sequence:
    """Place a prompt, settle its first `settled` tokens (all unless told otherwise) and register it."""
    sequence = new_sequence(ids, salt)
    matched = blocks.match(sequence)
    assert blocks.can_place(sequence, matched, reserve=0)
    sequence.place(blocks.place(sequence, matched), 16)
    missing = (sequence.num_tokens if settled is None else settled) - sequence.num_computed_tokens
    if missing > 0:
        sequence.advance(missing, sequence.num_uncomputed_tokens)
    blocks.register(sequence)
    return sequence


def num_hits(blocks: BlockManager, ids: Iterable[int], salt: str | None = None) -> int:
    """Tokens that a prompt would find."""
    return len(blocks.match(new_sequence(ids, salt))) * SIZE


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([*range(10), 99], 8),
        (range(10), 8),
        (range(9), 8),
        (range(8), 4),
        (range(5), 4),
        (range(4), 0),
        ([0], 0),
        ([0, 1, 2, 3, 4, 99, 6, 7, 8], 4),
        ([99, *range(1, 10)], 0),
        (range(4, 10), 0),
    ],
    ids=["longer", "same", "whole-blocks", "last-token-left", "one-over", "one-block", "one-token", "middle", "first", "moved"],
)
def test_whole_blocks_of_a_common_beginning_hit(ids: Iterable[int], expected: int) -> None:
    """At least one token is left to compute, and a block counts only behind the same tokens."""
    blocks = new_blocks()
    place(blocks, range(10))
    assert num_hits(blocks, ids) == expected


@pytest.mark.parametrize(("settled", "expected"), [(3, 0), (4, 4), (7, 4), (8, 8), (12, 12)])
def test_only_settled_full_blocks_are_registered(settled: int, expected: int) -> None:
    blocks = new_blocks()
    sequence = place(blocks, range(12), settled=settled)
    assert num_hits(blocks, range(20)) == expected
    blocks.free(sequence)
    assert num_hits(blocks, range(20)) == expected, "freeing forgets nothing"


def test_salts_share_nothing_with_each_other() -> None:
    blocks = new_blocks()
    place(blocks, range(8), "a")
    assert [num_hits(blocks, range(9), salt) for salt in ("a", "b", None)] == [8, 0, 0]


def test_switched_off_nothing_is_found() -> None:
    blocks = BlockManager(20, SIZE)
    place(blocks, range(8))
    assert num_hits(blocks, range(9)) == 0


def test_a_hit_takes_the_blocks_themselves() -> None:
    blocks = new_blocks()
    first = place(blocks, range(10))
    second = place(blocks, range(11))
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2], "the unfinished block is its own"
    assert blocks.num_free_blocks == 20 - 4
    blocks.check_invariants([first, second])
    blocks.free(first)
    assert blocks.num_free_blocks == 20 - 3
    blocks.check_invariants([second])
    assert (second.num_cached_tokens, second.num_cached_prompt_tokens) == (8, 8)


def test_the_least_recently_used_goes_first_and_beginnings_last() -> None:
    blocks = new_blocks(4)
    a, b = range(0, 9), range(10, 19)
    for ids in (a[:8], b[:8]):
        blocks.free(place(blocks, ids))
    found = []
    for other in range(4):
        taken = place(blocks, [100 + other], settled=0)
        found.append((num_hits(blocks, a), num_hits(blocks, b)))
        assert taken.num_cached_tokens == 0
    assert found == [(4, 8), (0, 8), (0, 4), (0, 0)]


def test_use_makes_young_again() -> None:
    blocks = new_blocks(4)
    a, b = range(0, 9), range(10, 19)
    for ids in (a[:8], b[:8], a[:8]):
        blocks.free(place(blocks, ids))
    place(blocks, [100], settled=0)
    assert (num_hits(blocks, a), num_hits(blocks, b)) == (8, 4)


def test_what_is_in_use_is_never_taken() -> None:
    blocks = new_blocks(4)
    running = place(blocks, range(8))
    others = [place(blocks, [100 + number]) for number in range(2)]
    assert not blocks.can_place(new_sequence([7]), [], reserve=0)
    for other in others:
        blocks.free(other)
    third = place(blocks, range(100, 108))
    blocks.check_invariants([running, third])
    assert num_hits(blocks, range(9)) == 8
    assert all(blocks.ref_counts[block] == 1 for block in running.block_table)


def test_cached_blocks_that_a_hit_takes_are_not_free_for_the_rest() -> None:
    """3 blocks, 2 of them cached and free: the prompt needs both and 2 more, and only 1 is left."""
    blocks = new_blocks(3)
    blocks.free(place(blocks, range(8)))
    sequence = new_sequence(range(13))
    assert len(blocks.match(sequence)) == 2
    assert not blocks.can_place(sequence, blocks.match(sequence), reserve=0)
    assert blocks.can_place(new_sequence(range(12)), blocks.match(new_sequence(range(12))), reserve=0)


def test_two_that_read_the_same_at_once_keep_one_entry() -> None:
    blocks = new_blocks(6)
    first, second = new_sequence(range(9)), new_sequence(range(9))
    for sequence in (first, second):
        sequence.place(blocks.place(sequence, []), 16)
    for sequence in (first, second):
        sequence.advance(9, 9)
        blocks.register(sequence)
        blocks.check_invariants([first, second])
    assert blocks.match(new_sequence(range(9))) == list(first.block_table[:2])
    blocks.free(first)
    third = place(blocks, range(100, 112))
    blocks.check_invariants([second, third])


def test_the_check_finds_a_block_under_a_wrong_name() -> None:
    blocks = new_blocks()
    sequence = place(blocks, range(12))
    sequence.block_table[0], sequence.block_table[1] = sequence.block_table[1], sequence.block_table[0]
    with pytest.raises(AssertionError, match="other content"):
        blocks.check_invariants([sequence])


PLAIN = tiny_model(tiny_config(**VARIANTS["plain"]))


def test_hits_are_counted_in_tokens_and_not_computed() -> None:
    """40 tokens and again: 36 of them are whole blocks short of the last token."""
    engine, item = make_engine(PLAIN), request(random_ids(40), 5)
    cold, warm = run(engine, [item]), run(engine, [item])
    assert [(done.total("num_prefix_queries"), done.total("num_prefix_hits")) for done in (cold, warm)] == [(40, 0), (40, 36)]
    assert [step.num_scheduled_tokens for step in warm.steps] == [4, 1, 1, 1, 1]
    assert warm.all_of("refinement_passes") == [1.0], "per token that was computed"
    assert warm.token_ids == cold.token_ids == [oracle(PLAIN, item)]


@pytest.mark.parametrize("variant", ["plain", "layerwise", "upper-middle-source"])
def test_a_second_turn_finds_what_the_first_generated(variant: str) -> None:
    """10 + 12 tokens, of which the last was never computed: 20 in whole blocks."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    engine = make_engine(model)
    [answer] = run(engine, [request(random_ids(10), 12)]).token_ids
    second = request([*random_ids(10), *answer, 7, 8, 9], 6)
    done = run(engine, [second])
    assert done.total("num_prefix_hits") == 20
    assert done.token_ids == [oracle(model, second)]


@pytest.mark.parametrize(("variant", "expected"), [("plain", 36), ("layerwise", 36), ("upper-middle-source", 0)])
def test_prompt_logprobs_come_from_cached_latents_or_a_new_reading(variant: str, expected: int) -> None:
    """Cached blocks can be scored where a latent is what the head reads; elsewhere the prompt is read anew."""
    model, ids = tiny_model(tiny_config(**VARIANTS[variant])), random_ids(40)
    engine, item = make_engine(model), request(ids, 3, prompt_logprobs=1)
    exact = torch.log_softmax(read(model, ids).logits, -1)
    wanted = [float(exact[position, token]) for position, token in enumerate(ids[1:])]
    for hits in (0, expected):
        done = run(engine, [item])
        assert done.total("num_prefix_hits") == hits
        [[outcome]] = done.outcomes
        assert outcome.token_ids == oracle(model, item)
        assert scores(outcome, ids) == pytest.approx(wanted, abs=1e-4)
    assert run(engine, [request(ids, 3)]).total("num_prefix_hits") == 36, "without logprobs everyone shares"


def test_a_long_hit_is_scored_within_the_budget_beside_who_decodes() -> None:
    """A step never scores more than the budget has rows for, and nobody who decodes waits for it."""
    model, ids = tiny_model(tiny_config(**VARIANTS["layerwise"])), random_ids(80)
    engine = make_engine(model, max_num_seqs=2, max_num_batched_tokens=4)
    expected = scores(run(engine, [request(ids, 0, prompt_logprobs=1)]).outcomes[0][0], ids)
    [decoding] = engine.add(request([5, 6, 7], 60))
    while not decoding.num_output_tokens:
        engine.step()
    [sequence] = engine.add(request(ids, 0, prompt_logprobs=1))
    outputs: list[SequenceOutput] = []
    scored: list[int] = []
    while not sequence.finished:
        before, output = decoding.num_output_tokens, engine.step()
        outputs += output.outputs
        scored.append(output.stats.num_scored_tokens)
        assert decoding.num_output_tokens == before + 1
    bound = 3 * engine.scheduler.scored_per_row
    assert (sequence.num_cached_tokens, sum(scored), max(scored)) == (76, 76, min(76, bound))
    entries = next(item.prompt_logprobs for item in outputs if item.sequence is sequence)
    assert entries is not None
    assert [entry.logprob for entry in entries[1:]] == pytest.approx(expected, abs=1e-5)


def scores(outcome: Outcome, ids: list[int]) -> list[float | None]:
    """The prompt's logprobs but the first, which is none."""
    assert outcome.prompt_logprobs is not None
    assert [entry.token_id for entry in outcome.prompt_logprobs] == ids
    assert outcome.prompt_logprobs[0].logprob is None
    return [entry.logprob for entry in outcome.prompt_logprobs[1:]]


def test_who_does_not_look_is_no_query() -> None:
    model, ids = tiny_model(tiny_config(**VARIANTS["upper-middle-source"])), random_ids(20)
    done = run(make_engine(model), [request(ids, 1), request(ids, 1, prompt_logprobs=0)])
    assert done.total("num_prefix_queries") == 20


def test_an_engine_without_the_cache_computes_everything() -> None:
    engine, item = make_engine(PLAIN, prefix_caching=False), request(random_ids(40), 5)
    for _ in range(2):
        done = run(engine, [item])
        assert (done.total("num_prefix_queries"), done.total("num_prefix_hits")) == (0, 0)
        assert done.total("num_scheduled_tokens") == 44
        assert done.token_ids == [oracle(PLAIN, item)]


def test_requests_of_different_salts_read_for_themselves() -> None:
    engine, ids = make_engine(PLAIN), random_ids(40)
    hits = [run(engine, [request(ids, 1, cache_salt=salt)]).total("num_prefix_hits") for salt in ("a", "b", None, "a")]
    assert hits == [0, 0, 0, 36]


def test_a_preempted_sequence_continues_from_what_is_cached() -> None:
    """20 blocks: the second gives way; the block it lost to the first is computed again and little more."""
    engine = make_engine(PLAIN, max_model_len=60, num_blocks=20)
    requests = [request(random_ids(30, seed), 30) for seed in range(2)]
    done = run(engine, requests)
    assert done.token_ids == [oracle(PLAIN, item) for item in requests]
    assert done.total("num_preemptions") > 0
    assert done.total("num_prefix_queries") == 60, "only newcomers count"
    cold = run(make_engine(PLAIN, max_model_len=60, num_blocks=20, prefix_caching=False), requests)
    assert done.total("num_recomputed_tokens") < cold.total("num_recomputed_tokens")


def test_clients_hear_of_cached_tokens() -> None:
    async def test() -> None:
        async with Bench() as bench:
            cached = []
            for _ in range(2):
                deltas = await collect(bench.engine.admit(request(random_ids(21), 2, n=2)))
                cached.append({delta.num_cached_tokens for delta in deltas})
            assert cached == [{0}, {20}]
            assert [stats.cached_tokens for stats in bench.recorder.finished] == [0, 0, 20, 20]

    run_async(test)
