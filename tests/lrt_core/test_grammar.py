"""Grammars over the tiny tokenizer: what they admit, where they end, what is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from lrt_core.generate import generate
from lrt_core.grammar import MAX_SOURCE_BYTES, Grammar, GrammarCompiler, GrammarError, GrammarKind, GrammarSource, GrammarState
from lrt_core.sampling import SampleRow, sample, sample_twin
from lrt_core.sampling_params import SamplingParams
from tests.helpers import TINY_VOCAB_SIZE, random_ids, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.eos_ids)
SPECIAL = set(TOKENIZER.special_tokens.values())


def grammar(kind: GrammarKind, text: str) -> Grammar:
    return COMPILER.compile(GrammarSource(kind, text))


def permitted(state: GrammarState) -> set[int]:
    return set(state.permitted().nonzero()[0].tolist())


def walk(state: GrammarState, text: str) -> GrammarState:
    """Accept a text, a byte a token."""
    for byte in text.encode():
        assert byte in permitted(state), (text, chr(byte))
        state.accept(byte)
    assert state.error is None
    return state


@pytest.mark.parametrize(
    ("kind", "source", "texts"),
    [
        ("regex", r"[a-c]{2,3}\d", ["ab1", "abc2"]),
        ("regex", "", [""]),
        ("choice", json.dumps(['say "hi"', "€uro 😀", "a\\b\n", "/x/"]), ['say "hi"', "€uro 😀", "a\\b\n", "/x/"]),
        ("grammar", 'start: "a" start "b" | "x"', ["x", "aaxbb"]),
        ("grammar", 'root ::= "a" root "b" | [0-9]+', ["7", "a12b"]),
        ("json", '{"type":"array","items":{"type":"integer"},"maxItems":2}', ["[]", "[1, -2]", "[\n  1,\n  2\n]"]),
        ("json", '{"$ref":"#/$defs/n","$defs":{"n":{"enum":["é",null,1.5]}}}', ['"é"', "null", "1.5"]),
    ],
)
def test_what_matches_is_admitted_and_may_end(kind: GrammarKind, source: str, texts: list[str]) -> None:
    for text in texts:
        state = walk(grammar(kind, source).start(), text)
        assert state.is_complete
        assert TOKENIZER.eos_ids <= permitted(state)


@pytest.mark.parametrize(
    ("schema", "is_taken"),
    [
        ({"type": "object", "minProperties": 2}, False),
        ({"patternProperties": {"^a$": {"const": 1}}, "additionalProperties": False, "minProperties": 2}, False),
        ({"properties": {"const": {"type": "object", "minProperties": 2}}}, False),
        ({"anyOf": [{"type": "null"}, {"type": "object", "minProperties": 3, "required": ["a", "b"]}]}, False),
        ({"type": "object", "minProperties": 1}, True),
        ({"properties": {"a": {"const": 1}, "b": {"const": 1}}, "required": ["a", "b"], "minProperties": 2}, True),
        ({"properties": {"minProperties": {"type": "integer"}}}, True),
        ({"const": {"minProperties": 9}}, True),
    ],
)
def test_no_object_reaches_its_number_of_properties_by_saying_a_key_twice(schema: dict[str, Any], is_taken: bool) -> None:
    if is_taken:
        grammar("json", json.dumps(schema))
    else:
        with pytest.raises(GrammarError, match="minProperties above 1 is supported only where"):
            grammar("json", json.dumps(schema))


def test_an_end_comes_only_where_the_text_matches() -> None:
    state = grammar("regex", "ab?").start()
    assert permitted(state) == {ord("a")}
    assert not state.is_complete
    walk(state, "a")
    assert permitted(state) == {ord("b"), *TOKENIZER.eos_ids}
    assert not state.is_exhausted
    walk(state, "b")
    assert permitted(state) == TOKENIZER.eos_ids
    assert state.is_exhausted


def test_without_an_end_the_text_goes_on_until_nothing_can_follow() -> None:
    state = walk(grammar("regex", "ab?").start(may_end=False), "a")
    assert permitted(state) == {ord("b")}
    assert walk(state, "b").is_exhausted


def test_a_model_without_an_end_gives_no_other_id_its_place() -> None:
    compiler = GrammarCompiler(TOKENIZER, ())
    state = compiler.compile(GrammarSource("regex", "(a|\x00)b?")).start(may_end=False)
    assert permitted(state) == {0, ord("a")}
    walk(state, "a")
    assert state.is_complete
    assert permitted(state) == {ord("b")}
    state = walk(compiler.compile(GrammarSource("regex", "\x00b")).start(may_end=False), "\x00b")
    assert state.is_exhausted


@pytest.mark.parametrize(
    "source",
    [
        'start: "x" "[temperature=1]"',
        "start: /x[temperature=1]+/",
        'start: "x"\n// a[temperature=1]',
        "root ::= [x] [temperature=]",
    ],
)
def test_a_temperature_in_a_text_is_a_text(source: str) -> None:
    walk(grammar("grammar", source).start(), "x")


def test_states_are_independent() -> None:
    shared = grammar("regex", "(ab|ac)d")
    first, second = shared.start(), shared.start()
    walk(first, "abd")
    assert permitted(second) == {ord("a")}


def test_tokens_of_several_letters_are_admitted_with_their_bytes() -> None:
    state = grammar("regex", "(the|[xyz])").start()
    assert {TOKENIZER.ranks[b"th"], ord("t"), ord("x")} <= permitted(state)


def test_json_goes_on_with_blanks_for_a_while_only() -> None:
    state = walk(grammar("json", '{"type":"object"}').start(), "{\n" + " " * 32)
    assert ord(" ") not in permitted(state)


@pytest.mark.parametrize("kind", ["regex", "grammar", "json"])
def test_special_tokens_are_never_admitted(kind: GrammarKind) -> None:
    source = {"regex": ".*", "grammar": "start: /(.|\n)*/", "json": '{"type":"string"}'}[kind]
    state = grammar(kind, source).start()
    if kind == "json":
        walk(state, '"')
    assert permitted(state) & SPECIAL <= (TOKENIZER.eos_ids if kind != "json" else set())
    assert len(permitted(state)) > 100


def test_an_id_that_is_not_admitted_is_an_error_that_stays() -> None:
    state = grammar("regex", "ab").start()
    state.accept(ord("x"))
    assert state.error is not None
    assert permitted(state) == set()
    assert not state.is_complete
    state.accept(ord("a"))
    assert permitted(state) == set()


def test_a_state_too_complex_to_follow_is_an_error() -> None:
    """Right recursion without an end: every token adds items."""
    state = grammar("grammar", 'start: a\na: "x" a').start()
    for _ in range(5000):
        state.accept(ord("x"))
    assert state.error is not None


def test_a_step_that_takes_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    state = walk(grammar("regex", "[a-d]{9}").start(), "ab")
    monkeypatch.setattr("lrt_core.grammar.MAX_STEP_SECONDS", -1.0)
    assert permitted(state) == set()
    assert state.error == "takes too long to follow"
    with pytest.raises(GrammarError, match="takes too long to follow"):
        grammar("regex", "a")


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("grammar", "start: foo", "unknown name"),
        ("grammar", "start: %%", "lexer error"),
        ("grammar", 'start: <|user_start|> "a"', "unknown special token"),
        ("grammar", f"start: <[{TOKENIZER.special_tokens['<|user_start|>']}]>", "admits no text"),
        ("grammar", '{"grammars":[]}', "Lark or GBNF"),
        ("grammar", "", "root"),
        ("grammar", "start: a\na[max_tokens=3, temperature = 0.5]: /x*/", "one temperature"),
        ("json", '{"type":"foo"}', "Invalid type"),
        ("json", '{"type":"object","dependentRequired":{"a":["b"]}}', "Unimplemented"),
        ("json", '{"oneOf":[{"type":"integer"},{"type":"number"}]}', "oneOf constraints are not supported"),
        ("json", '{"x-guidance":{"lenient":true},"type":"object","dependentRequired":{"a":["b"]}}', "Unimplemented"),
        ("json", '{"$ref":"file:///somewhere"}', "not present"),
        ("json", '{"$ref":"#"}', "admits no text"),
        ("json", '{"type":"string","minLength":5,"maxLength":2}', "Unsatisfiable"),
        ("json", "[" * 1000, "recursion limit"),
        ("json", '{"type":"object"', "EOF"),
    ],
)
def test_what_is_no_grammar_is_refused(kind: GrammarKind, source: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        grammar(kind, source)
    assert len(str(caught.value)) < 400
    assert "option" not in str(caught.value)


def test_a_source_has_a_largest_size() -> None:
    GrammarSource("regex", "a" * MAX_SOURCE_BYTES)
    with pytest.raises(GrammarError, match="limit"):
        GrammarSource("regex", "é" * (MAX_SOURCE_BYTES // 2) + "a")


def test_sampling_takes_only_what_is_permitted() -> None:
    logits = torch.randn(3, TINY_VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 5
    logits[:, 7] = 40.0
    kept = logits.clone()
    state = grammar("regex", "[a-d]").start()
    rows = [
        SampleRow(SamplingParams(temperature=0), permitted=state.permitted()),
        SampleRow(SamplingParams(temperature=0)),
        SampleRow(SamplingParams(temperature=1.5, top_p=0.9), seed=3, permitted=state.permitted()),
    ]
    for draw in (sample, sample_twin):
        ids = draw(logits, rows).tolist()
        assert ids[0] == max(range(ord("a"), ord("d") + 1), key=lambda id: float(logits[0, id]))
        assert ids[1] == 7
        assert ids[2] in range(ord("a"), ord("d") + 1)
    assert torch.equal(logits, kept)


def test_the_grammar_wins_where_nothing_is_left() -> None:
    logits = torch.zeros(1, TINY_VOCAB_SIZE)
    state = grammar("regex", "[a-d]").start()
    params = SamplingParams(temperature=0, allowed_token_ids=(ord("x"),))
    assert sample(logits, [SampleRow(params, permitted=state.permitted())]).tolist() == [ord("a")]


def test_the_oracle_follows_a_grammar() -> None:
    model = tiny_model()
    words = grammar("choice", '["yes","no","maybe"]')
    eos = TOKENIZER.eos_ids
    for seed in range(10):
        params = SamplingParams(temperature=1.5, seed=seed)
        ids = list(generate(model, random_ids(5, seed), 20, params, eos, grammar=words))
        assert ids[-1] in eos
        assert TOKENIZER.decode(ids[:-1]) in ("yes", "no", "maybe")
        assert TOKENIZER.decode(list(generate(model, random_ids(5, seed), 20, params, (), grammar=words))) in (
            "yes",
            "no",
            "maybe",
        )


def test_random_walks_stay_within_a_grammar() -> None:
    """Whatever is chosen among the admitted ids, the text can be finished and is then valid."""
    choose = random.Random(0)
    schema = grammar(
        "json", '{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"],"additionalProperties":false}'
    )
    for _ in range(20):
        state, ids = schema.start(), []
        while not state.is_exhausted:
            ids.append(choose.choice(sorted(permitted(state) - TOKENIZER.eos_ids)))
            state.accept(ids[-1])
        assert set(json.loads(TOKENIZER.decode(ids))) == {"a"}
