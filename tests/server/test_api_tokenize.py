"""/tokenize, /detokenize and /tokenizer_info, and what lm-evaluation-harness makes of them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.helpers import SPECIAL_NAMES, tiny_tokenizer
from tests.server.fakes import MAX_MODEL_LEN, FakeEngine, assert_envelope, call, make_app

TOKENIZER = tiny_tokenizer()
BOS = TOKENIZER.special_tokens["<|bos|>"]
MESSAGES = [{"role": "user", "content": "the <|bos|>"}]


def post(path: str, **body: Any) -> httpx.Response:
    return call(make_app(FakeEngine(), max_body_size=1_000_000), "POST", path, json=body)


def tokens(**body: Any) -> list[int]:
    response = post("/tokenize", **body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == MAX_MODEL_LEN
    ids: list[int] = answer["tokens"]
    return ids


@pytest.mark.parametrize("prompt", ["", "the end", "東京", "a<|bos|>b", "x" * 30_000])
def test_a_prompt_is_tokenised_as_completions_do(prompt: str) -> None:
    assert tokens(prompt=prompt) == TOKENIZER.encode(prompt)
    assert tokens(prompt=prompt, add_special_tokens=False) == TOKENIZER.encode(prompt, add_bos=False)
    assert tokens(prompt=prompt, add_special_tokens=True) == TOKENIZER.encode(prompt, add_bos=True)


def test_the_documents_start_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(engine.tokenizer, "add_bos", False)
    app, asked = make_app(engine), {"prompt": "the", "add_special_tokens": True}
    plain = call(app, "POST", "/tokenize", json={"prompt": "the"}).json()["tokens"]
    assert call(app, "POST", "/tokenize", json=asked).json()["tokens"] == [BOS, *plain]
    monkeypatch.setattr(engine.tokenizer, "bos_id", None)
    refused = call(app, "POST", "/tokenize", json=asked)
    assert "this checkpoint has none" in assert_envelope(refused, 400, "invalid_request_error", "add_special_tokens")


def test_special_tokens_when_asked_for() -> None:
    assert tokens(prompt="a<|bos|>", add_special_tokens=False, allow_special=True) == [97, BOS]
    assert tokens(prompt="a<|bos|>", add_special_tokens=False)[:2] == [97, ord("<")]


@pytest.mark.parametrize("name", SPECIAL_NAMES)
def test_a_prompt_that_is_a_name_is_that_token(name: str) -> None:
    """The harness learns ids so; text with more in it than a name stays text."""
    assert tokens(prompt=name, add_special_tokens=False) == [TOKENIZER.special_tokens[name]]
    assert tokens(prompt=name, add_special_tokens=False, allow_special=False) == TOKENIZER.encode(name, add_bos=False)
    assert tokens(prompt=name + " ", add_special_tokens=False) == TOKENIZER.encode(name + " ", add_bos=False)


def test_messages_are_rendered_as_chats_do() -> None:
    frame = [TOKENIZER.special_tokens[name] for name in SPECIAL_NAMES]
    closed = [BOS, frame[1], *TOKENIZER.encode("the <|bos|>", add_bos=False), frame[2]]
    assert tokens(messages=MESSAGES) == [*closed, frame[3]]
    assert tokens(messages=MESSAGES, add_generation_prompt=False) == closed
    assert tokens(messages=MESSAGES, continue_final_message=True) == closed[:-1]


def test_token_strings() -> None:
    assert post("/tokenize", prompt="the").json()["token_strs"] is None
    assert post("/tokenize", prompt="the", return_token_strs=True).json()["token_strs"] == ["<|bos|>", "th", "e"]


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({}, "prompt", "or messages must be given"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt", "and not both"),
        ({"prompt": ["a"]}, "prompt", "valid string"),
        ({"prompt": "\ud800"}, "prompt", "lone surrogate"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "has no meaning for a prompt"),
        ({"messages": MESSAGES, "allow_special": True}, "allow_special", "has no meaning for messages"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens", "has no meaning for messages"),
        ({"messages": [], "tools": []}, "tools", "is not supported by this server"),
        ({"prompt": "a", "surprise": 1}, "surprise", "is not a known field"),
    ],
)
def test_what_cannot_be_tokenised(body: dict[str, Any], param: str, told: str) -> None:
    response = call(make_app(FakeEngine()), "POST", "/tokenize", content=json.dumps(body))
    assert told in assert_envelope(response, 400, "invalid_request_error", param)


def test_ids_become_text() -> None:
    ids = [BOS, *TOKENIZER.encode("héllo", add_bos=False)]
    assert post("/detokenize", tokens=ids).json() == {"prompt": "<|bos|>héllo"}
    assert post("/detokenize", tokens=[]).json() == {"prompt": ""}
    assert post("/detokenize", tokens=[97] * 10_000).json() == {"prompt": "a" * 10_000}


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({}, "tokens", "is required"),
        ({"tokens": [1, TOKENIZER.vocab_size]}, "tokens", "out of range"),
        ({"tokens": [1, -1] + [-2] * 10_000}, "tokens", "must hold ids of at least 0, not -1"),
        ({"tokens": "a"}, "tokens", "must be a list of integer token ids"),
        ({"tokens": [True]}, "tokens", "must be a list of integer token ids"),
        ({"tokens": [0] * 10_000 + [10**30]}, "tokens", "out of range"),
    ],
)
def test_what_is_no_id(body: dict[str, Any], param: str, told: str) -> None:
    assert told in assert_envelope(post("/detokenize", **body), 400, "invalid_request_error", param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_an_unknown_model(path: str) -> None:
    body = {"model": "other", **({"prompt": "a"} if path == "/tokenize" else {"tokens": []})}
    assert_envelope(post(path, **body), 404, "model_not_found", "model")


def test_tokenizer_info() -> None:
    info = call(make_app(FakeEngine()), "GET", "/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<|bos|>", "<|assistant_end|>", None)
    assert info["chat_template"] == TOKENIZER.chat_template
    assert info["vocab_size"] == TOKENIZER.vocab_size and info["model_max_length"] == MAX_MODEL_LEN
    assert tokens(prompt=info["eos_token"], add_special_tokens=False)[0] in TOKENIZER.eos_ids
    engine = FakeEngine()
    engine.tokenizer = tiny_tokenizer(chat_template=None)
    assert call(make_app(engine), "GET", "/tokenizer_info").json()["chat_template"] is None
