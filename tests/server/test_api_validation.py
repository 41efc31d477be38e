"""Every way in which a completion request can be wrong, and what it is told."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lrt_core.tokenizer import TokenizerError
from server.api import prompts
from server.api.schemas import MAX_CHOICES, NOT_BUILT, CompletionRequest, parse_fields
from tests.helpers import TINY_VOCAB_SIZE
from tests.server.fakes import MAX_MODEL_LEN, NAME, FakeEngine, assert_envelope, complete

INVALID = "invalid_request_error"

WRONG: list[tuple[str, Any, str]] = [
    ("model", 3, "string"),
    ("model", "\ud800", "surrogate"),
    ("prompt", 3, "must be a string, a list"),
    ("prompt", {"a": 1}, "must be a string, a list"),
    ("prompt", [], "must not be empty"),
    ("prompt", [[]], "empty list"),
    ("prompt", [[1], []], "empty list"),
    ("prompt", ["a", 1], "must hold"),
    ("prompt", ["a", [1]], "must hold"),
    ("prompt", [[1], 2], "must hold"),
    ("prompt", [True, False], "must hold"),
    ("prompt", [[True]], "must hold"),
    ("prompt", [1.0, 2.0], "must hold"),
    ("prompt", [[[1]]], "must hold"),
    ("prompt", [None], "must hold"),
    ("prompt", [-1], "token id -1"),
    ("prompt", [0, TINY_VOCAB_SIZE], f"token id {TINY_VOCAB_SIZE}"),
    ("prompt", [[0], [10**30]], "token id 1000"),
    ("prompt", "\udc00", "surrogate"),
    ("prompt", [[1]] * (MAX_CHOICES + 1), f"more than {MAX_CHOICES} choices"),
    ("max_tokens", -1, "greater than or equal to 0"),
    ("max_tokens", 1.5, "integer"),
    ("max_tokens", "3", "integer"),
    ("max_tokens", True, "integer"),
    ("max_tokens", 0, "only with echo"),
    ("temperature", -0.1, "greater than or equal to 0"),
    ("temperature", "hot", "number"),
    ("temperature", True, "number"),
    ("temperature", 10**400, "number"),
    ("top_p", 0, "greater than 0"),
    ("top_p", 1.01, "less than or equal to 1"),
    ("top_k", -2, "greater than or equal to -1"),
    ("top_k", 2.0, "integer"),
    ("n", 0, "greater than or equal to 1"),
    ("n", 129, "less than or equal to 128"),
    ("n", True, "integer"),
    ("stop", 3, "string or a list of strings"),
    ("stop", "", "empty string"),
    ("stop", ["a", ""], "empty string"),
    ("stop", ["a", 3], "string or a list of strings"),
    ("stop", ["\ud800"], "surrogate"),
    ("ignore_eos", "yes", "boolean"),
    ("ignore_eos", 1, "boolean"),
    ("seed", 2**63, "less than"),
    ("seed", -(2**63) - 1, "greater than"),
    ("seed", 1.0, "integer"),
    ("logprobs", -1, "greater than or equal to 0"),
    ("logprobs", 21, "less than or equal to 20"),
    ("logprobs", True, "integer"),
    ("echo", "true", "boolean"),
    ("return_token_ids", 0, "boolean"),
    ("stream", "false", "boolean"),
    ("stream_options", True, "dictionary"),
    ("stream_options", {}, "only with stream"),
    ("surprise", 1, "not a known field"),
    ("messages", [], "not a known field"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG, ids=[f"{i}-{w[0]}" for i, w in enumerate(WRONG)])
def test_wrong_field_is_named(field: str, value: Any, message: str) -> None:
    engine = FakeEngine()
    told = assert_envelope(complete(engine, **{field: value}), 400, INVALID, field)
    assert f"'{field}'" in told and message in told
    assert len(told) < 500
    assert engine.requests == []
    assert complete(engine).status_code == 200


@pytest.mark.parametrize("field", sorted(NOT_BUILT))
@pytest.mark.parametrize("lenient", [False, True])
def test_documented_but_unbuilt_field_is_refused(field: str, lenient: bool) -> None:
    outer, _, inner = field.partition(".")
    fields = {outer: {inner: True}, "stream": True} if inner else {outer: 0}
    told = assert_envelope(complete(FakeEngine(), lenient, **fields), 400, INVALID, field)
    assert told == f"'{field}' is not supported by this server"


def test_null_counts_as_absent() -> None:
    engine = FakeEngine()
    options = {"include_usage": None, "continuous_usage_stats": None}
    nulls = {name: None for name in ("best_of", "suffix", "max_tokens", "stop", "temperature", "response_format", "surprise")}
    assert complete(engine, stream=True, stream_options=options, **nulls).status_code == 200
    assert engine.requests[0].stopping.max_tokens == 16
    assert_envelope(complete(engine, prompt=None), 400, INVALID, "prompt")


def test_without_a_model_the_served_one_answers() -> None:
    named, unnamed = complete(FakeEngine()), complete(FakeEngine(), model=None)
    assert unnamed.status_code == 200
    assert unnamed.json()["model"] == named.json()["model"]


def test_missing_prompt_is_named() -> None:
    with pytest.raises(Exception, match="'prompt' is required"):
        parse_fields(CompletionRequest, {"model": "x"})


@pytest.mark.parametrize("field", ["stream_options.surprise", "surprise"])
def test_lenient_drops_unknown_fields_with_a_warning(field: str) -> None:
    outer, _, inner = field.partition(".")
    fields: dict[str, Any] = {outer: {inner: 1} if inner else 1, "stream": True}
    assert_envelope(complete(FakeEngine(), **fields), 400, INVALID, field)
    response = complete(FakeEngine(), lenient=True, **fields)
    assert response.status_code == 200
    assert response.headers["warning"] == f'299 lrt-server "ignored unknown fields: {field}"'


def test_warning_header_cannot_be_injected() -> None:
    response = complete(FakeEngine(), lenient=True, **{'a"\r\nx-evil: 1\u00e9': 1})
    assert "x-evil" not in response.headers
    assert response.headers["warning"] == '299 lrt-server "ignored unknown fields: a???x-evil? 1?"'


def test_at_most_ten_problems_are_listed_and_inputs_truncated() -> None:
    response = complete(FakeEngine(), **{f"unknown{i}": 1 for i in range(12)}, temperature="x" * 10_00)
    told = assert_envelope(response, 400, INVALID, "unknown0")
    assert told.count("is not a known field") == 10
    assert told.endswith("; and 3 more")
    told = assert_envelope(complete(FakeEngine(), temperature="x" * 5000), 400, INVALID, "temperature")
    assert len(told) < 150


def test_unknown_model() -> None:
    told = assert_envelope(complete(FakeEngine(), model="x" * 500), 404, "model_not_found", "model")
    assert len(told) < 250
    assert complete(FakeEngine(), model="alias").json()["model"] == "alias"


@pytest.mark.parametrize(
    ("length", "max_tokens", "echo", "fits"),
    [
        (MAX_MODEL_LEN + 1, 1, False, False),
        (MAX_MODEL_LEN, 1, False, False),
        (MAX_MODEL_LEN + 1, 0, True, False),
        (MAX_MODEL_LEN, 0, True, True),
        (MAX_MODEL_LEN - 1, 1, False, True),
        (MAX_MODEL_LEN - 1, 1000, False, True),
    ],
)
def test_context_length(length: int, max_tokens: int, echo: bool, fits: bool) -> None:
    engine = FakeEngine()
    for prompt in ([1] * length, "." * (length - 1)):  # a text gets one token in front
        response = complete(engine, prompt=prompt, max_tokens=max_tokens, echo=echo)
        if fits:
            assert response.status_code == 200
            assert engine.requests[-1].stopping.max_tokens == min(max_tokens, MAX_MODEL_LEN - length)
        else:
            told = assert_envelope(response, 400, "context_length_exceeded", "prompt")
            assert told.startswith(f"This model's maximum context length is {MAX_MODEL_LEN} tokens")
            assert f"your prompt has {length} tokens" in told


def test_hopelessly_long_text_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(engine.tokenizer, "encode", lambda *_, **_options: pytest.fail("the text was tokenised"))
    response = complete(engine, prompt="a" * 5000)
    assert "at least" in assert_envelope(response, 400, "context_length_exceeded", "prompt")


def test_much_text_is_tokenised_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    threads = set()

    def encode(_text: str, **_options: bool) -> list[int]:
        threads.add(threading.current_thread())
        return [1] * 5

    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    monkeypatch.setattr(prompts, "MANY_CHARACTERS", 600)
    assert complete(engine, prompt=["a" * 60] * 10).status_code == 200
    assert threads == {threading.main_thread()}
    assert complete(engine, prompt=["a" * 60] * 11).status_code == 200
    assert len(threads) == 2


def test_text_that_the_tokenizer_gives_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()

    def give_up(_text: str, **_options: bool) -> list[int]:
        raise TokenizerError("too long a run")

    monkeypatch.setattr(engine.tokenizer, "encode", give_up)
    assert "too long a run" in assert_envelope(complete(engine), 400, INVALID, "prompt")


@pytest.mark.parametrize("prompt", ["", ["a", ""]])
def test_empty_text_is_refused(prompt: str | list[str]) -> None:
    assert "empty" in assert_envelope(complete(FakeEngine(), prompt=prompt), 400, INVALID, "prompt")


def test_defaults_and_every_field_reach_the_engine() -> None:
    engine = FakeEngine()
    assert complete(engine, prompt=[1, 2]).status_code == 200
    assert (
        complete(
            engine,
            model=NAME,
            prompt=[[3], [4, 5]],
            max_tokens=7,
            temperature=0,
            top_p=0.5,
            top_k=10**30,
            n=3,
            stop=list("abcdef"),
            ignore_eos=True,
            seed=-(2**63),
            logprobs=20,
            echo=True,
        ).status_code
        == 200
    )
    default, first, second = engine.requests
    assert default.prompt_ids == (1, 2) and default.n == 1
    assert (default.stopping.max_tokens, default.stopping.ignore_eos, default.stopping.stop) == (16, False, ())
    assert (default.sampling.temperature, default.sampling.top_p, default.sampling.top_k) == (1.0, 1.0, 0)
    assert (default.sampling.seed, default.logprobs, default.prompt_logprobs) == (None, None, None)
    assert (first.prompt_ids, second.prompt_ids) == ((3,), (4, 5))
    assert first.request_id != second.request_id
    assert (first.stopping.max_tokens, first.stopping.ignore_eos, first.stopping.stop) == (7, True, tuple("abcdef"))
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (0, 0.5, TINY_VOCAB_SIZE)
    assert (first.n, first.sampling.seed, first.logprobs, first.prompt_logprobs) == (3, -(2**63), 20, 20)
