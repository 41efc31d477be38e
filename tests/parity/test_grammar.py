"""Samples that follow a grammar come out the same alone, in any batch, after a fork, a cache hit or a preemption: as the oracle
has them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from lrt_core.grammar import Grammar, GrammarCompiler, GrammarKind, GrammarSource
from server.engine.request import GenerationRequest
from tests.engines import Outcome, Run, make_engine, oracle, request, run
from tests.helpers import VARIANTS, random_ids, tiny_config, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_ids
COMPILER = GrammarCompiler(TOKENIZER, EOS)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


def grammar(kind: GrammarKind, text: str) -> Grammar:
    return COMPILER.compile(GrammarSource(kind, text))


GRAMMARS = [
    grammar("json", json.dumps(SCHEMA)),
    grammar("regex", "[a-z]{3,12}=[0-9]{1,6};"),
    grammar("choice", json.dumps(["in the end", "import", "self.th"])),
    grammar("grammar", 'start: "(" start ")" | /[a-z]{1,3}/'),
    None,
]


def mixed_requests(count: int, max_tokens: int = 60) -> list[GenerationRequest]:
    """A grammar each and none, greedy and sampled, with and without penalties."""
    rng = random.Random(2)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.8}, {"repetition_penalty": 1.3}]
    return [
        request(
            random_ids(rng.choice([1, 7, 16, 33]), seed=number),
            max_tokens,
            seed=number,
            grammar=GRAMMARS[number % len(GRAMMARS)],
            **kinds[number % len(kinds)],
        )
        for number in range(count)
    ]


def check_against_oracle(model: Any, requests: list[GenerationRequest], done: Run) -> None:
    for item, [outcome] in zip(requests, done.outcomes, strict=True):
        assert outcome.token_ids == oracle(model, item, EOS)
        if item.grammar is not None and outcome.finish_reason == "stop":
            assert_matches(item.grammar, outcome)


def assert_matches(wanted: Grammar, outcome: Outcome) -> None:
    """A sample that has ended is a text of its grammar, and an end-of-sequence id."""
    *text, end = outcome.token_ids
    assert end in EOS
    state = wanted.start()
    for token in text:
        state.accept(token)
    assert state.is_complete


@pytest.mark.parametrize("variant", ["layerwise", "upper-middle-source", "plain"])
def test_a_batch_of_grammars_and_none_is_the_oracle_s(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    requests = mixed_requests(15)
    done = run(make_engine(model, EOS), requests)
    check_against_oracle(model, requests, done)
    assert sum(outcome.finish_reason == "stop" for [outcome] in done.outcomes) >= 8


def test_a_grammar_changes_nothing_beside_it() -> None:
    model = tiny_model()
    requests = mixed_requests(10)
    together = run(make_engine(model, EOS), requests).token_ids
    alone = [run(make_engine(model, EOS), [item]).token_ids[0] for item in requests]
    assert together == alone


def test_preempted_samples_go_on_where_they_were() -> None:
    model = tiny_model()
    requests = mixed_requests(12, max_tokens=70)
    done = run(make_engine(model, EOS, max_model_len=120, num_blocks=32), requests)
    assert done.total("num_preemptions") > 0
    check_against_oracle(model, requests, done)


def test_every_sample_of_a_prompt_has_a_state_of_its_own() -> None:
    model = tiny_model()
    item = request(random_ids(20), 60, n=6, temperature=1.5, seed=5, grammar=GRAMMARS[0])
    [outcomes] = run(make_engine(model, EOS), [item]).outcomes
    for index, outcome in enumerate(outcomes):
        single = request(random_ids(20), 60, temperature=1.5, seed=5 + index, grammar=GRAMMARS[0])
        assert outcome.token_ids == oracle(model, single, EOS)
        assert_matches(GRAMMARS[0], outcome)
    assert len({tuple(outcome.token_ids) for outcome in outcomes}) > 1


def test_a_cached_prompt_gives_the_same() -> None:
    model, engine = tiny_model(), make_engine(tiny_model(), EOS)
    items = [request(random_ids(40), 50, temperature=1.0, seed=1, grammar=grammar) for grammar in GRAMMARS]
    for item in items:
        done = run(engine, [item])
        assert done.token_ids == [oracle(model, item, EOS)]
    assert done.total("num_prefix_hits") > 0


@pytest.mark.parametrize("ignores", [True, False])
def test_where_no_id_ends_a_sample_its_grammar_does(ignores: bool) -> None:
    model = tiny_model()
    engine = make_engine(model, EOS if ignores else ())
    for grammar in GRAMMARS[:4]:
        item = request(random_ids(9), 100, temperature=1.0, seed=3, ignore_eos=ignores, grammar=grammar)
        [[outcome]] = run(engine, [item]).outcomes
        assert outcome.token_ids == oracle(model, item, EOS if ignores else ())
        assert not EOS & set(outcome.token_ids)
        if outcome.finish_reason == "stop":
            state = grammar.start(may_end=False)
            for token in outcome.token_ids:
                state.accept(token)
            assert state.is_exhausted


def test_a_length_that_is_too_short_cuts_the_text_off() -> None:
    [[outcome]] = run(make_engine(tiny_model(), EOS), [request(random_ids(9), 3, grammar=GRAMMARS[0])]).outcomes
    assert outcome.finish_reason == "length"
    assert len(outcome.token_ids) == 3


def test_reported_logprobs_are_the_model_s_own() -> None:
    """Of the distribution before the grammar: its likeliest tokens need not be admitted."""
    model = tiny_model()
    free = request(random_ids(9), 1, logprobs=5)
    bound = request(random_ids(9), 1, logprobs=5, grammar=GRAMMARS[1])
    [[first]], [[second]] = (run(make_engine(model, EOS), [item]).outcomes for item in (free, bound))
    assert first.tokens[0].top == second.tokens[0].top


def test_a_grammar_that_fails_ends_its_sample_alone() -> None:
    endless = grammar("grammar", 'start: a\na: "x" a')
    engine = make_engine(tiny_model(), EOS, max_model_len=1000, num_blocks=1000)
    engine.add(request(random_ids(4), 900, grammar=endless))
    [other] = engine.add(request(random_ids(5), 900, ignore_eos=True))
    errors = []
    while engine.has_work():
        errors += [item for item in engine.step().outputs if item.error is not None]
    [failed] = errors
    assert (failed.token, failed.finish_reason) == (None, "abort")
    assert failed.error
    assert other.num_output_tokens == 900
    assert engine.blocks.num_free_blocks == engine.config.num_blocks
