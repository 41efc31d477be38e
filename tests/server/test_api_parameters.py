"""The parameter matrix: every field of a completion changes the output as it should, has its bounds, and its 400.

Most expectations come from the oracle, token by token and alone.
"""

from __future__ import annotations

import base64
import logging
import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lrt_core.generate import generate, read
from lrt_core.sampling_params import SamplingParams
from server.api import completions
from server.api.completions import MAX_LATENT_BYTES
from server.api.events import whole
from server.api.schemas import (
    MAX_CHOICES,
    CompletionRequest,
    StreamOptions,
)
from server.api.values import MAX_CHARACTERS, MAX_NAME, MAX_STOP_IDS, MAX_STRINGS
from server.engine import model_runner
from server.engine.engine import StepOutput
from server.engine.model_runner import logits_rows
from tests.helpers import TINY_VOCAB_SIZE, VARIANTS, random_ids, tiny_config, tiny_model
from tests.server.fakes import FakeEngine, assert_envelope, call, complete, events, make_app
from tests.server.live import EOS, PROMPT, TOKENIZER, Live, LiveChat, defaults

INVALID = "invalid_request_error"
A, B = ord("a"), ord("b")
BOS = TOKENIZER.bos_id


@cache
def live() -> Live:
    return Live()


def oracle(max_tokens: int = 12, min_tokens: int = 0, prompt: list[int] = PROMPT, **params: Any) -> list[int]:
    """What the first sample must come to."""
    sampling = SamplingParams(**{"temperature": 0.0, **params})
    return list(generate(live().model, prompt, max_tokens, sampling, TOKENIZER.eos_ids, min_tokens))


def usage(body: dict[str, Any]) -> tuple[int, int]:
    return body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]


# Every field: the same request with two values of it, and what of the answer must differ.

Look = Callable[[dict[str, Any]], Any]


def ids_of(body: dict[str, Any]) -> Any:
    return [choice["token_ids"] for choice in body["choices"]]


def texts_of(body: dict[str, Any]) -> Any:
    return [choice["text"] for choice in body["choices"]]


def prompt_of(body: dict[str, Any]) -> Any:
    return body["choices"][0]["prompt_token_ids"]


def shape_of(body: dict[str, Any]) -> Any:
    return sorted(body["choices"][0])


HOT = {"temperature": 1.0, "seed": 1}
ENDING = {"logit_bias": {str(EOS): 100}}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], Look]] = {
    "prompt": ({}, {"prompt": [1, 2]}, ids_of),
    "max_tokens": ({}, {"max_tokens": 3}, ids_of),
    "min_tokens": (ENDING, {**ENDING, "min_tokens": 2}, ids_of),
    "temperature": ({"seed": 1}, HOT, ids_of),
    "top_p": (HOT, {**HOT, "top_p": 0.1}, ids_of),
    "top_k": (HOT, {**HOT, "top_k": 1}, ids_of),
    "min_p": (HOT, {**HOT, "min_p": 0.5}, ids_of),
    "presence_penalty": ({}, {"presence_penalty": 2}, ids_of),
    "frequency_penalty": ({}, {"frequency_penalty": 2}, ids_of),
    "repetition_penalty": ({}, {"repetition_penalty": 3}, ids_of),
    "logit_bias": ({}, {"logit_bias": {"97": 100}}, ids_of),
    "allowed_token_ids": ({}, {"allowed_token_ids": [A, B]}, ids_of),
    "bad_words": ({"allowed_token_ids": [A, B], **HOT}, {"allowed_token_ids": [A, B], "bad_words": ["aa"], **HOT}, ids_of),
    "n": ({}, {"n": 2}, ids_of),
    "best_of": ({**HOT, "max_tokens": 4}, {**HOT, "max_tokens": 4, "best_of": 5}, usage),
    "stop": ({"allowed_token_ids": [A]}, {"allowed_token_ids": [A], "stop": "aaa"}, texts_of),
    "stop_token_ids": ({"allowed_token_ids": [A]}, {"allowed_token_ids": [A], "stop_token_ids": [A]}, ids_of),
    "include_stop_str_in_output": (
        {"allowed_token_ids": [A], "stop": "aa"},
        {"allowed_token_ids": [A], "stop": "aa", "include_stop_str_in_output": True},
        texts_of,
    ),
    "ignore_eos": (ENDING, {**ENDING, "ignore_eos": True}, ids_of),
    "seed": (HOT, {**HOT, "seed": 2}, ids_of),
    "logprobs": ({}, {"logprobs": 1}, lambda body: body["choices"][0]["logprobs"]),
    "echo": ({}, {"echo": True}, texts_of),
    "prompt_logprobs": ({}, {"prompt_logprobs": 1}, shape_of),
    "return_token_ids": ({}, {"return_token_ids": False}, shape_of),
    "latents": ({}, {"latents": "last"}, shape_of),
    "add_special_tokens": ({"prompt": "hi"}, {"prompt": "hi", "add_special_tokens": False}, prompt_of),
    "allow_special": ({"prompt": "<|bos|>"}, {"prompt": "<|bos|>", "allow_special": True}, prompt_of),
    "truncate_prompt_tokens": ({}, {"truncate_prompt_tokens": 3}, prompt_of),
    "request_id": ({}, {"request_id": "mine"}, lambda body: body["id"] == "mine"),
    "stream_options.continuous_usage_stats": (
        {"stream": True},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        lambda body: body["usage"],
    ),
    "stream_options.include_usage": (
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        lambda body: body["usage"],
    ),
}
ELSEWHERE = {"model", "stream", "priority", "cache_salt", "user", "response_format", "structured_outputs"}
"""Fields whose effect takes another test to see: below, `model` in test_api_validation.py, `stream` in every stream, forms of
output in test_structured.py."""


def test_every_field_is_tried() -> None:
    fields = set(CompletionRequest.model_fields) - {"stream_options"}
    fields |= {f"stream_options.{name}" for name in StreamOptions.model_fields}
    assert fields == CHANGES.keys() | ELSEWHERE


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_changes_the_output(field: str) -> None:
    without, with_it, look = CHANGES[field]
    before, after = look(live().body(**without)), look(live().body(**with_it))
    assert before != after
    assert look(live().body(**without)) == before, "nothing else changed"


WRONG: list[tuple[str, Any, str]] = [
    ("min_tokens", -1, "greater than or equal to 0"),
    ("min_tokens", 17, "more than max_tokens, which is 16"),
    ("min_tokens", 1.0, "integer"),
    ("min_p", -0.1, "greater than or equal to 0"),
    ("min_p", 1.1, "less than or equal to 1"),
    ("presence_penalty", 2.1, "less than or equal to 2"),
    ("presence_penalty", "much", "number"),
    ("frequency_penalty", -2.1, "greater than or equal to -2"),
    ("repetition_penalty", 0, "greater than or equal to 0.01"),
    ("repetition_penalty", 101, "less than or equal to 100"),
    ("logit_bias", [1], "object of numbers by token id"),
    ("logit_bias", {"a": 1}, "token ids as keys, not 'a'"),
    ("logit_bias", {"-1": 1}, "token ids as keys"),
    ("logit_bias", {"01": 1}, "token ids as keys"),
    ("logit_bias", {"1": 101}, "from -100 to 100"),
    ("logit_bias", {"1": True}, "from -100 to 100"),
    ("logit_bias", {"1": None}, "from -100 to 100"),
    ("allowed_token_ids", [], "must not be empty"),
    ("allowed_token_ids", ["a"], "list of integer token ids"),
    ("allowed_token_ids", 3, "list of integer token ids"),
    ("bad_words", "word", "list of strings"),
    ("bad_words", ["a", ""], "empty string"),
    ("bad_words", ["a"] * (MAX_STRINGS + 1), f"more than {MAX_STRINGS} strings"),
    ("stop_token_ids", [True], "list of integer token ids"),
    ("stop_token_ids", list(range(MAX_STOP_IDS + 1)), f"more than {MAX_STOP_IDS} ids"),
    ("include_stop_str_in_output", 1, "boolean"),
    ("best_of", 0, "greater than or equal to 1"),
    ("best_of", 129, "less than or equal to 128"),
    ("prompt_logprobs", -1, "greater than or equal to 0"),
    ("prompt_logprobs", 21, "less than or equal to 20"),
    ("latents", "first", "'last' or 'all'"),
    ("latents", True, "'last' or 'all'"),
    ("add_special_tokens", "no", "boolean"),
    ("allow_special", 1, "boolean"),
    ("truncate_prompt_tokens", 0, "at least 1, or -1"),
    ("truncate_prompt_tokens", -2, "greater than or equal to -1"),
    ("truncate_prompt_tokens", 65, "at most 64"),
    ("suffix", "end", "cannot fill in"),
    ("priority", 2**63, "less than"),
    ("priority", "high", "integer"),
    ("cache_salt", "", "at least 1 character"),
    ("cache_salt", "s" * (MAX_NAME + 1), f"at most {MAX_NAME} characters"),
    ("user", 3, "string"),
    ("user", "u" * (MAX_NAME + 1), f"at most {MAX_NAME} characters"),
    ("request_id", "a b", "letters, digits"),
    ("request_id", "", "letters, digits"),
    ("request_id", "x" * 129, "1 to 128"),
    ("request_id", "a\n", "letters, digits"),
]


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(("field", "value", "message"), WRONG, ids=[f"{i}-{w[0]}" for i, w in enumerate(WRONG)])
def test_a_wrong_value_is_a_400_that_names_the_field(field: str, value: Any, message: str, lenient: bool) -> None:
    engine = FakeEngine()
    told = assert_envelope(complete(engine, lenient, **{field: value}), 400, INVALID, field)
    assert f"'{field}'" in told and message in told and len(told) < 300
    assert engine.requests == []


OUTSIDE: list[tuple[str, dict[str, Any]]] = [
    ("logit_bias", {"logit_bias": {str(TINY_VOCAB_SIZE): 1}}),
    ("allowed_token_ids", {"allowed_token_ids": [0, TINY_VOCAB_SIZE]}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("min_tokens", {"min_tokens": 12, "prompt": [1] * 150}),
    ("allowed_token_ids", {"allowed_token_ids": [EOS], "min_tokens": 1}),
    ("allowed_token_ids", {"allowed_token_ids": [A], "bad_words": ["aa"]}),
    ("stop", {"stop": ["a" * MAX_CHARACTERS, "b"]}),
    ("bad_words", {"bad_words": ["a" * MAX_CHARACTERS, "b"]}),
    ("best_of", {"best_of": 1, "n": 2}),
    ("best_of", {"best_of": 3, "n": 2, "stream": True}),
    ("prompt", {"best_of": 128, "prompt": [[1]] * (MAX_CHOICES // 128 + 1)}),
    ("logprobs", {"logprobs": 20, "echo": True, "n": 128, "prompt": [[1] * 150] * 4}),
    ("prompt_logprobs", {"prompt_logprobs": 20, "n": 128, "prompt": [[1] * 150] * 4}),
    ("latents", {"latents": "all", "n": 100, "prompt": [[1] * 100] * 10, "max_tokens": 60}),
]


@pytest.mark.parametrize(("field", "fields"), OUTSIDE, ids=[f"{i}-{o[0]}" for i, o in enumerate(OUTSIDE)])
def test_what_only_the_engine_or_other_fields_make_wrong_is_named_too(
    field: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.completions.MAX_LATENT_BYTES", 2**22)
    assert_envelope(live().ask(**fields), 400, INVALID, field)


BOUNDS: list[tuple[str, dict[str, Any]]] = [
    ("min_tokens", {"min_tokens": 12}),
    ("min_p", {"min_p": 1}),
    ("logit_bias", {"logit_bias": {"0": -100, str(TINY_VOCAB_SIZE - 1): 100}}),
    ("logit_bias", {"logit_bias": {}}),
    ("repetition_penalty", {"repetition_penalty": 100}),
    ("repetition_penalty", {"repetition_penalty": 0.01}),
    ("stop", {"stop": ["a" * (MAX_CHARACTERS - MAX_STRINGS + 1), *["b"] * (MAX_STRINGS - 1)]}),
    ("bad_words", {"bad_words": []}),
    ("stop_token_ids", {"stop_token_ids": []}),
    ("allowed_token_ids", {"allowed_token_ids": [7] * 3000}),
    ("prompt_logprobs", {"prompt_logprobs": 20, "logprobs": 20}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 160}),
    ("priority", {"priority": -(2**63)}),
    ("request_id", {"request_id": "a-b_c.d:" + "1" * 120}),
    ("best_of", {"best_of": 1, "stream": True}),
]


@pytest.mark.parametrize(("field", "fields"), BOUNDS, ids=[f"{i}-{b[0]}" for i, b in enumerate(BOUNDS)])
def test_bounds_are_allowed(field: str, fields: dict[str, Any]) -> None:
    assert field in fields and live().body(**fields)["choices"]


# Sampling: what the oracle samples.


@pytest.mark.parametrize(
    "heat", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.5, "seed": 4, "top_k": 40, "top_p": 0.9}]
)
@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -0.7}, {"frequency_penalty": -0.7}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"min_p": 0.2}, {"min_p": 0.2}),
        ({"logit_bias": {"98": 4.5, "220": -8}}, {"logit_bias": {98: 4.5, 220: -8.0}}),
        ({"allowed_token_ids": [220, A, 217]}, {"allowed_token_ids": (220, A, 217)}),
        ({"bad_words": ["a", "ab"]}, {"bad_words": ((A,), (32, A), (A, B), (32, A, B))}),
        (
            {
                "allowed_token_ids": [A, B, 99],
                "bad_words": ["ab"],
                "presence_penalty": 2,
                "repetition_penalty": 1.2,
                "min_p": 0.1,
            },
            {
                **{"allowed_token_ids": (A, B, 99), "bad_words": ((A, B), (32, A, B)), "presence_penalty": 2},
                **{"repetition_penalty": 1.2, "min_p": 0.1},
            },
        ),
    ],
)
def test_sampling_fields_do_what_the_oracle_does(fields: dict[str, Any], params: dict[str, Any], heat: dict[str, Any]) -> None:
    assert live().ids(max_tokens=24, **fields, **heat) == oracle(24, **params, **heat)


@pytest.mark.parametrize("fields", [{}, {"n": 3, "logprobs": 1, "echo": True, "prompt_logprobs": 1}, {"latents": "all"}])
def test_a_model_that_overflows_is_a_failure_that_says_so(fields: dict[str, Any]) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule("layers.0.mlp.up").weight[0] = 1e30  # type: ignore[index,operator]
    sick = Live(model)
    told = assert_envelope(sick.ask(**fields), 500, "not_finite")
    assert told == "Generation failed: the model's states came to be no numbers."
    *_, last = events(sick.ask(stream=True, **fields))
    assert last["error"]["code"] == "not_finite"


def test_a_long_answer_is_written_beside_the_loop_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"prompt": ["the", "end"], "n": 2, "logprobs": 3, "prompt_logprobs": 2, "seed": 5, "max_tokens": 9}
    threads = []
    monkeypatch.setattr(completions, "whole", lambda *parts: threads.append(threading.current_thread()) or whole(*parts))
    short = live().body(**fields)
    monkeypatch.setattr(completions, "MANY_ITEMS", 5)
    long = live().body(**fields)
    assert threads[0] is not threads[1]
    assert long["choices"] == short["choices"] and long["usage"]["completion_tokens"] == short["usage"]["completion_tokens"]


def test_bad_words_are_cut_into_tokens_once_for_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    encode, texts = engine.tokenizer.encode, []
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text, **how: texts.append(text) or encode(text, **how))
    body = {"prompt": [[A]] * 5, "bad_words": ["a", "x" * 40_000], "max_tokens": 1}
    assert call(make_app(engine, max_body_size=100_000), "POST", "/v1/completions", json=body).status_code == 200
    assert texts == ["a", " a", "x" * 40_000, " " + "x" * 40_000]
    assert len({id(request.sampling) for request in engine.requests}) == 1


def test_fields_of_one_request_do_not_reach_another() -> None:
    bodies = [
        defaults({}),
        defaults({"presence_penalty": 2}),
        defaults({"allowed_token_ids": [A]}),
        defaults({"bad_words": ["a"]}),
    ]
    alone = [live().post(body)[0].json()["choices"] for body in bodies]
    assert [response.json()["choices"] for response in live().post(*bodies)] == alone


def test_penalties_survive_a_preemption() -> None:
    """A pool too small for both: the later is preempted and goes on, its history as it was."""
    small = Live(num_blocks=18, prefix_caching=False)
    prompts = [[*PROMPT[:4], number] for number in (7, 9)]
    fields = {"max_tokens": 50, "presence_penalty": 1.0, "repetition_penalty": 1.3, "ignore_eos": True, "latents": "all"}
    (response,) = small.post(defaults({**fields, "prompt": prompts}))  # one request, so that both are there at once
    assert small.engine.scheduler.totals.num_preemptions > 0
    for prompt, answer in zip(prompts, response.json()["choices"], strict=True):
        sampling = SamplingParams(temperature=0, presence_penalty=1.0, repetition_penalty=1.3)
        assert answer["token_ids"] == list(generate(small.model, prompt, 50, sampling))
        assert_latents(answer, [*prompt, *answer["token_ids"][:-1]], small)


def test_a_bad_word_cannot_be_made_of_its_tokens() -> None:
    fields = {"allowed_token_ids": [A, B], **HOT, "max_tokens": 100}
    assert "aab" in live().choice(**fields)["text"]
    assert "aab" not in live().choice(bad_words=["aab"], **fields)["text"]
    assert "b" in live().choice(bad_words=["aab"], **fields)["text"]


def test_a_bad_word_is_forbidden_behind_a_space_too() -> None:
    """` d` is one token, `d` another."""
    space_d, d = TOKENIZER.encode(" d", add_bos=False), TOKENIZER.encode("d", add_bos=False)
    assert len(space_d) == len(d) == 1 and space_d != d
    fields = {"allowed_token_ids": [A, *space_d, *d], **HOT, "max_tokens": 60}
    assert {*space_d, *d} <= set(live().ids(**fields))
    assert set(live().ids(bad_words=["d"], **fields)) == {A}


# Stopping.


def test_min_tokens_suppresses_every_end() -> None:
    assert live().ids(**ENDING) == [EOS]
    found = live().choice(min_tokens=4, **ENDING)
    assert found["token_ids"] == oracle(min_tokens=4, logit_bias={EOS: 100.0}) and len(found["token_ids"]) == 5
    assert found["token_ids"][-1] == EOS and (found["finish_reason"], found["stop_reason"]) == ("stop", None)
    named = {"stop_token_ids": [A], "logit_bias": {str(A): 100}}
    assert live().ids(**named) == [A]
    held = live().choice(min_tokens=2, **named)
    assert len(held["token_ids"]) == 3 and A not in held["token_ids"][:2] and held["stop_reason"] == A


def test_min_tokens_lets_stop_strings_pass() -> None:
    fields = {"allowed_token_ids": [A], "stop": ["aa"]}
    assert live().choice(**fields)["text"] == "" and len(live().ids(**fields)) == 2
    for stream in (False, True):
        found = live().choice(min_tokens=5, stream=stream, **fields)
        assert found["text"] == "aaa" and found["stop_reason"] == "aa"
        assert len(found["token_ids"]) == 5


def test_stop_token_ids_end_and_are_cut_from_the_text() -> None:
    base = live().ids(allowed_token_ids=[A, B], **HOT)
    fields = {"allowed_token_ids": [A, B], "stop_token_ids": [B], **HOT}
    end = base.index(B)
    assert 0 < end < 11
    for stream in (False, True):
        found = live().choice(stream=stream, logprobs=1, **fields)
        assert found["token_ids"] == base[: end + 1] and len(found["logprobs"]["tokens"]) == end + 1
        assert (found["text"], found["finish_reason"], found["stop_reason"]) == ("a" * end, "stop", B)
        kept = live().choice(stream=stream, include_stop_str_in_output=True, **fields)
        assert kept["text"] == "a" * end + "b"


def test_an_end_of_sequence_id_has_no_stop_reason_unless_it_was_named() -> None:
    assert live().choice(**ENDING)["stop_reason"] is None
    assert live().choice(stop_token_ids=[EOS], **ENDING)["stop_reason"] == EOS
    assert live().choice(stop_token_ids=[EOS], ignore_eos=True, **ENDING)["stop_reason"] == EOS
    ignored = live().choice(ignore_eos=True, **ENDING)
    assert ignored["token_ids"] == [EOS] * 12 and (ignored["finish_reason"], ignored["text"]) == ("length", "")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_kept_when_asked_and_never_leaks_otherwise(stream: bool) -> None:
    fields = {"allowed_token_ids": [A, B], "stop": ["bbbb" * 50, "ab", "ba"], **HOT, "max_tokens": 40, "stream": stream}
    whole = live().choice(**{**fields, "stop": []})["text"]
    found = live().choice(**fields)
    position, stop = min((whole.index(text), text) for text in ("ab", "ba"))
    assert (found["text"], found["stop_reason"]) == (whole[:position], stop)
    assert live().choice(include_stop_str_in_output=True, **fields)["text"] == whole[: position + 2]


# best_of.


def test_best_of_ranks_by_mean_logprob_and_counts_every_sample() -> None:
    fields = {"temperature": 1.2, "seed": 5, "max_tokens": 9, "logit_bias": {str(EOS): 6}}
    every = live().body(n=6, logprobs=0, **fields)
    means = [sum(x["logprobs"]["token_logprobs"]) / len(x["token_ids"]) for x in every["choices"]]
    assert len({len(choice["token_ids"]) for choice in every["choices"]}) > 1, "lengths differ, so that the mean matters"
    ranked = [every["choices"][i]["token_ids"] for i in sorted(range(6), key=lambda i: -means[i])]
    best = live().body(best_of=6, n=2, **fields)
    assert ids_of(best) == ranked[:2] and ids_of(best) != ids_of(every)[:2]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    assert usage(best) == usage(every)
    assert ids_of(live().body(best_of=2, n=2, **fields)) == ids_of(every)[:2]


def test_best_of_ranks_each_prompt_alone() -> None:
    fields = {"temperature": 1.0, "seed": 5, "best_of": 4}
    apart = [live().choice(prompt=prompt, **fields)["token_ids"] for prompt in (PROMPT, [1, 2, 3])]
    together = live().body(prompt=[PROMPT, [1, 2, 3]], **fields)["choices"]
    assert [choice["token_ids"] for choice in together] == apart
    assert [choice["index"] for choice in together] == [0, 1]


# Logprobs.


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_logprobs_are_the_oracle_s(stream: bool) -> None:
    found = live().body(prompt_logprobs=2, n=2, stream=stream)["choices"]
    logprobs = torch.log_softmax(read(live().model, PROMPT).logits, dim=-1)
    for choice in found:
        first, *rest = choice["prompt_logprobs"]
        assert first is None and len(rest) == len(PROMPT) - 1
        for row, token, entry in zip(logprobs, PROMPT[1:], rest, strict=False):
            top = row.topk(2)
            assert next(iter(entry)) == str(token) and set(entry) == {str(token), *map(str, top.indices.tolist())}
            own = entry[str(token)]
            assert own["rank"] == 1 + int((row > row[token]).sum()) and own["decoded_token"] == TOKENIZER.decode([token])
            for id, item in entry.items():
                assert item["logprob"] == pytest.approx(float(row[int(id)]), abs=1e-4)
            assert entry[str(int(top.indices[1]))]["rank"] == 2


def test_prompt_logprobs_and_echo_each_have_their_own_number() -> None:
    choice = live().choice(echo=True, logprobs=1, prompt_logprobs=3)
    assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"][1:])
    assert all(3 <= len(entry) <= 4 for entry in choice["prompt_logprobs"][1:])
    assert len(choice["logprobs"]["tokens"]) == len(PROMPT) + 12
    bare = live().choice(prompt_logprobs=0)
    assert bare["logprobs"] is None and all(len(entry) == 1 for entry in bare["prompt_logprobs"][1:])


def test_the_server_says_how_many_logprobs() -> None:
    few = Live(max_logprobs=2)
    for field in ("logprobs", "prompt_logprobs"):
        assert few.body(**{field: 2})["choices"]
        assert "less than or equal to 2" in assert_envelope(few.ask(**{field: 3}), 400, INVALID, field)
    assert len(Live(max_logprobs=50).choice(prompt_logprobs=50)["prompt_logprobs"][1]) >= 50


@pytest.mark.parametrize("kind", [Live, LiveChat])
def test_the_server_says_how_many_tokens_an_event_has(kind: type[Live]) -> None:
    options: dict[str, Any] = {"n": 2, "logprobs": 1 if kind is Live else True, "max_tokens": 24, "seed": 1, "temperature": 1}
    plain, gathering = kind(), kind(stream_interval=6)
    streamed = [choice for chunk in events(gathering.ask(stream=True, **options)) for choice in chunk["choices"]]
    for index in range(2):
        sizes = [len(choice["token_ids"]) for choice in streamed if choice["index"] == index and choice.get("token_ids")]
        assert sum(sizes) == 24 and len(sizes) <= 5 and {size % 6 for size in sizes[1:-1]} <= {0}, sizes
    whole = plain.body(**options)["choices"]
    assert without_logprobs(gathering.body(stream=True, **options)["choices"]) == without_logprobs(whole)


def without_logprobs(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choices but for their logprobs, which depend on the batch in their last bits."""
    return [{key: value for key, value in choice.items() if key not in ("logprobs", "prompt_token_ids")} for choice in choices]


def test_logits_exist_in_chunks_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {
        "prompt": random_ids(100),
        "echo": True,
        "logprobs": 2,
        "prompt_logprobs": 3,
        "n": 8,
        **HOT,
        "cache_salt": "chunks",
    }
    whole = live().body(**fields)["choices"]
    monkeypatch.setattr(model_runner, "LOGITS_BYTES", 3 * 4 * TINY_VOCAB_SIZE)
    model, sizes = live().engine.runner.model, []
    compute = model.logits

    def logits(hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return compute(hidden)

    monkeypatch.setattr(model, "logits", logits)
    chunked = live().body(**{**fields, "cache_salt": "chunks again"})["choices"]
    assert max(sizes) == 3
    assert [choice["token_ids"] for choice in chunked] == [choice["token_ids"] for choice in whole]
    flat = [[x for x in choice["logprobs"]["token_logprobs"] if x is not None] for choice in (*whole, *chunked)]
    for before, after in zip(flat[:8], flat[8:], strict=True):
        assert len(before) == 111 and before == pytest.approx(after, abs=1e-4)


@pytest.mark.parametrize(("vocab_size", "rows"), [(1, 256), (320, 256), (50304, 83), (10**8, 1)])
def test_logits_are_bounded_in_bytes_and_rows(vocab_size: int, rows: int) -> None:
    assert logits_rows(vocab_size) == rows


# Prompts.


def test_special_tokens_are_added_as_asked() -> None:
    text = TOKENIZER.encode("the end", add_bos=False)
    assert prompt_of(live().body(prompt="the end")) == [BOS, *text]
    assert prompt_of(live().body(prompt="the end", add_special_tokens=True)) == [BOS, *text]
    assert prompt_of(live().body(prompt="the end", add_special_tokens=False)) == text
    assert prompt_of(live().body(prompt=[1, 2], add_special_tokens=True)) == [1, 2], "ids stay as they are"
    echoed = live().choice(prompt="the end", add_special_tokens=False, echo=True, logprobs=0, max_tokens=0)
    assert echoed["logprobs"]["text_offset"][0] == 0 and len(echoed["logprobs"]["tokens"]) == len(text)


def test_special_tokens_cannot_be_had_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(engine.tokenizer, "bos_id", None)
    monkeypatch.setattr(engine.tokenizer, "add_bos", False)
    assert "none" in assert_envelope(complete(engine, add_special_tokens=True), 400, INVALID, "add_special_tokens")
    assert complete(engine).status_code == 200


def test_a_prompt_cannot_forge_special_tokens_unless_allowed() -> None:
    forged = "a<|assistant_start|>b"
    assert prompt_of(live().body(prompt=forged)) == [BOS, *TOKENIZER.encode(forged, add_bos=False)]
    assert not set(prompt_of(live().body(prompt=forged))[1:]) & set(TOKENIZER.special_tokens.values())
    asked = live().body(prompt=forged, allow_special=True, echo=True, max_tokens=0)
    assert prompt_of(asked) == [BOS, A, TOKENIZER.special_tokens["<|assistant_start|>"], B]
    assert texts_of(asked) == [forged]


def test_long_names_of_special_tokens_do_not_make_a_text_too_long() -> None:
    """30 tokens whose names are 19 bytes each, more than 160 tokens of any other text of that length would be long."""
    assert len(prompt_of(live().body(prompt="<|assistant_start|>" * 140, allow_special=True))) == 141


def test_truncation_keeps_the_last_tokens() -> None:
    long = random_ids(300)
    assert prompt_of(live().body(prompt=long, truncate_prompt_tokens=5)) == long[-5:]
    assert prompt_of(live().body(prompt=long[:4], truncate_prompt_tokens=5)) == long[:4]
    assert prompt_of(live().body(prompt=long, truncate_prompt_tokens=-1)) == long[-159:]
    whole = live().body(prompt=long, truncate_prompt_tokens=-1, max_tokens=0, echo=True)
    assert prompt_of(whole) == long[-160:] and usage(whole) == (160, 0)
    text = live().body(prompt="the end of it " * 500, truncate_prompt_tokens=4, echo=True, max_tokens=0)
    assert texts_of(text) == [TOKENIZER.decode(TOKENIZER.encode("the end of it ")[-4:])]
    assert_envelope(live().ask(prompt=long, truncate_prompt_tokens=160), 400, "context_length_exceeded", "prompt")
    assert_envelope(live().ask(truncate_prompt_tokens=161), 400, INVALID, "truncate_prompt_tokens")


# Who asks, and who is served first.


def test_a_request_is_called_as_its_client_says() -> None:
    assert live().body(request_id="mine-1")["id"] == "mine-1"
    assert {chunk["id"] for chunk in events(live().ask(request_id="mine-2", stream=True))} == {"mine-2"}
    by_header = live().post(defaults({}), headers={"X-Request-Id": "theirs"})[0].json()["id"]
    assert by_header == "theirs"
    both = live().post(defaults({"request_id": "mine"}), headers={"X-Request-Id": "theirs"})[0].json()["id"]
    assert both == "mine"
    unusable = live().post(defaults({}), headers={"X-Request-Id": "no good"})[0].json()["id"]
    assert unusable.startswith("cmpl-")


def test_the_log_says_who_asked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="server.api.completions"):
        live().body(user="alice", request_id="mine")
    assert [record.getMessage() for record in caplog.records] == ["mine: 1 prompts, user 'alice'"]


def test_lower_priorities_are_served_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place only; the engine begins once all are there."""
    one, order, ready = Live(max_num_seqs=1), [], threading.Event()
    step, add = one.engine.step, one.engine.add

    def admit(item: Any) -> Any:
        found = add(item)
        if len(one.engine.scheduler.waiting) == 3:
            ready.set()
        return found

    def wait_and_step() -> StepOutput:
        if not ready.is_set():
            return StepOutput()
        output = step()
        order.extend(item.sequence.request.request_id for item in output.outputs if item.finish_reason is not None)
        return output

    monkeypatch.setattr(one.engine, "add", admit)
    monkeypatch.setattr(one.engine, "step", wait_and_step)
    one.post(*(defaults({"priority": priority, "request_id": str(priority)}) for priority in (5, 0, -3)))
    assert order == ["-3-0", "0-0", "5-0"]


def test_what_is_cached_is_shared_only_under_the_same_salt() -> None:
    own, prompt = Live(), random_ids(40)

    def num_cached(**fields: Any) -> int:
        found = own.body(prompt=prompt, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]
        return int(found)

    assert [num_cached() for _ in range(2)] == [0, 36]
    assert [num_cached(cache_salt="a") for _ in range(2)] == [0, 36]
    assert [num_cached(cache_salt="b"), num_cached(), num_cached(cache_salt="a")] == [0, 36, 36]


def test_usage_in_every_chunk_counts_what_was_sent() -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    *chunks, last = events(live().ask(stream=True, stream_options=options))
    counts, num_ids = [], 0
    for chunk in chunks:
        num_ids += len(chunk["choices"][0]["token_ids"])
        counts.append(chunk["usage"]["completion_tokens"])
        assert counts[-1] == num_ids and chunk["usage"]["prompt_tokens"] == len(PROMPT)
        assert chunk["usage"]["total_tokens"] == len(PROMPT) + num_ids
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == counts[-1] == 12
    alone = events(live().ask(stream=True, stream_options={"continuous_usage_stats": True}))
    assert all(chunk["choices"] and chunk["usage"] for chunk in alone)


# Latents.


def assert_latents(choice: dict[str, Any], ids: list[int], server: Live, only_last: bool = False) -> None:
    """They are those that the oracle has for `ids`."""
    expected = read(server.model, ids).latents
    expected = expected[-1:] if only_last else expected
    found = choice["latents"]
    assert found["dtype"] == "float32" and found["shape"] == list(expected.shape)
    actual = torch.frombuffer(bytearray(base64.b64decode(found["data"])), dtype=torch.float32).view(found["shape"])
    assert (actual - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("latents", ["last", "all"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stream": True},
        {"n": 3, **HOT},
        {"n": 3, **HOT, "stream": True},
        {"best_of": 4, "n": 2, **HOT},
        {"prompt": random_ids(90, 5)},
        {"max_tokens": 1},
        {"max_tokens": 0, "echo": True},
        {"max_tokens": 0, "echo": True, "n": 2, "logprobs": 1},
        {"allowed_token_ids": [A], "stop": "aaa"},
        {"allowed_token_ids": [A], "stop": "aaa", "stream": True},
        ENDING,
    ],
    ids=str,
)
def test_latents_are_the_oracle_s(latents: str, fields: dict[str, Any]) -> None:
    for _ in range(2):  # the second time the prompt comes from the cache
        for choice in live().body(latents=latents, **fields)["choices"]:
            computed = [*fields.get("prompt", PROMPT), *choice["token_ids"][:-1]]
            assert_latents(choice, computed, live(), only_last=latents == "last")


@pytest.mark.parametrize("variant", ["upper-middle-source", "residual-only"])
def test_latents_of_a_source_layer_below_the_last(variant: str) -> None:
    other = Live(tiny_model(tiny_config(**VARIANTS[variant])))
    choice = other.choice(latents="all")
    assert_latents(choice, [*PROMPT, *choice["token_ids"][:-1]], other)


def test_latents_come_with_the_last_chunk_of_a_choice_alone() -> None:
    chunks = [chunk["choices"][0] for chunk in events(live().ask(latents="all", stream=True, n=2))]
    assert all(("latents" in chunk) == (chunk["finish_reason"] is not None) for chunk in chunks)
    assert sum("latents" in chunk for chunk in chunks) == 2


def test_a_plain_model_has_no_latents() -> None:
    plain = Live(tiny_model(tiny_config(**VARIANTS["plain"])))
    assert "plain" in assert_envelope(plain.ask(latents="last"), 400, INVALID, "latents")
    assert plain.choice()["finish_reason"] == "length"


def test_latents_are_bounded() -> None:
    assert MAX_LATENT_BYTES == 64 * 2**20
    assert math.prod((1, 2048, 768, 4)) < MAX_LATENT_BYTES, "a long sequence of a small model fits"
