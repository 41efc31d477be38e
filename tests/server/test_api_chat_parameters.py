"""The parameter matrix of chats: every field changes the answer as it should, has its bounds, and its 400.

What a chat generates is what a completion of the same ids generates, whose matrix `test_api_parameters.py` holds against the
oracle; so most fields are tried by that comparison, plain and streamed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from server.api.chat_schemas import ChatRequest
from server.api.schemas import CompletionRequest, StreamOptions
from tests.server.fakes import FakeEngine, assert_envelope, chat, events
from tests.server.live import EOS, TOKENIZER, Live, LiveChat
from tests.server.test_api_parameters import BOUNDS, CHANGES, HOT, INVALID, OUTSIDE, WRONG, A

NAMES = ChatRequest.model_fields.keys() - {"logprobs", "return_token_ids", "request_id"}
FIELDS = {name: change for name, change in CHANGES.items() if name in NAMES}
"""What chats and completions have in common, but for what has nothing to do with a choice's content."""
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The "}]


@cache
def live() -> LiveChat:
    return LiveChat()


@cache
def completions() -> Live:
    return Live(live().model)


def as_completion(choice: dict[str, Any]) -> dict[str, Any]:
    """A chat's choice as the completion of its prompt would be, but for logprobs."""
    message = choice["message"]
    assert message["role"] == "assistant" and message["refusal"] is None
    rest = {key: value for key, value in choice.items() if key not in ("message", "logprobs")}
    return {**rest, "text": message["content"]}


def agree(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices, which must be those of a completion of the same ids, streamed or not."""
    body = live().body(**{**fields, "return_token_ids": True})
    prompt = body["choices"][0]["prompt_token_ids"]
    shared = {name: value for name, value in fields.items() if name in CompletionRequest.model_fields}
    same = completions().body(**{**shared, "return_token_ids": True, "prompt": prompt, "stream": False})
    assert [as_completion(choice) for choice in body["choices"]] == [
        {key: value for key, value in choice.items() if key != "logprobs"} for choice in same["choices"]
    ]
    if not fields.get("stream"):
        assert counts(body) == counts(same)
        assert agree({**fields, "stream": True}) == body["choices"]
    return list(body["choices"])


def counts(body: dict[str, Any]) -> dict[str, Any]:
    """Usage but for what was cached, which depends on who asked before."""
    return {key: value for key, value in body["usage"].items() if key != "prompt_tokens_details"}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_does_what_it_does_to_completions(field: str) -> None:
    without, with_it, _ = FIELDS[field]
    before, after = agree(without), agree(with_it)
    assert before != after


OWN: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[dict[str, Any]], Any]]] = {
    "messages": ({}, {"messages": TURNS[:1]}, lambda body: body["choices"][0]["prompt_token_ids"]),
    "max_completion_tokens": ({}, {"max_tokens": None, "max_completion_tokens": 3}, lambda body: body["usage"]),
    "logprobs": ({}, {"logprobs": True}, lambda body: body["choices"][0]["logprobs"]),
    "top_logprobs": (
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2},
        lambda body: body["choices"][0]["logprobs"]["content"][0]["top_logprobs"],
    ),
    "add_generation_prompt": (
        {"messages": TURNS},
        {"messages": TURNS, "add_generation_prompt": False},
        lambda body: body["choices"][0]["prompt_token_ids"],
    ),
    "continue_final_message": (
        {"messages": TURNS},
        {"messages": TURNS, "continue_final_message": True},
        lambda body: body["choices"][0]["prompt_token_ids"],
    ),
    "return_token_ids": ({}, {"return_token_ids": False}, lambda body: sorted(body["choices"][0])),
    "request_id": ({}, {"request_id": "mine"}, lambda body: body["id"] == "mine"),
    "response_format": ({}, {"response_format": {"type": "json_object"}}, lambda body: body["choices"][0]["message"]),
    "structured_outputs": ({}, {"structured_outputs": {"choice": ["zz"]}}, lambda body: body["choices"][0]["message"]),
    "cache_salt": ({}, {"cache_salt": "fresh"}, lambda body: body["usage"]["prompt_tokens_details"]),
}
ELSEWHERE = {"model", "stream", "stream_options", "priority", "user"}
"""Fields whose effect takes another test to see: `model` in test_api_chat.py, the rest below; `priority` and `user` do the same
in the same code for every route."""


def test_every_field_is_tried() -> None:
    assert set(ChatRequest.model_fields) == FIELDS.keys() | OWN.keys() | ELSEWHERE
    assert set(StreamOptions.model_fields) == {"include_usage", "continuous_usage_stats"}, "both are tried below"


@pytest.mark.parametrize("field", OWN)
def test_a_field_of_chats_changes_the_answer(field: str) -> None:
    without, with_it, look = OWN[field]
    live().body(**without)  # so that the prompt is cached
    before, after = look(live().body(**without)), look(live().body(**with_it))
    assert before != after
    assert look(live().body(**without)) == before, "nothing else changed"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_a_completion(stream: bool) -> None:
    fields = {"n": 2, "max_tokens": 6, **HOT, "stream": stream}
    body = live().body(logprobs=True, top_logprobs=3, **fields)
    prompt = body["choices"][0]["prompt_token_ids"]
    same = completions().body(prompt=prompt, logprobs=3, **fields)
    for choice, other in zip(body["choices"], same["choices"], strict=True):
        entries, columns = choice["logprobs"]["content"], other["logprobs"]
        assert len(entries) == len(choice["token_ids"]) == 6
        assert [entry["logprob"] for entry in entries] == pytest.approx(columns["token_logprobs"], abs=1e-5)
        assert [entry["token"] for entry in entries] == columns["tokens"]
        for entry, id, top in zip(entries, choice["token_ids"], columns["top_logprobs"], strict=True):
            assert bytes(entry["bytes"]) == TOKENIZER.token_bytes(id)
            likeliest = entry["top_logprobs"]
            assert len(likeliest) == 3 and all(set(item) == {"token", "logprob", "bytes"} for item in likeliest)
            falling = [item["logprob"] for item in likeliest]
            assert falling == sorted(falling, reverse=True) and max(top.values()) == pytest.approx(falling[0], abs=1e-5)
            assert all(item != entry or item["logprob"] == entry["logprob"] for item in likeliest)


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_logprobs_and_latents_together(stream: bool) -> None:
    """With everything else that a choice can carry."""
    fields = {"prompt_logprobs": 2, "latents": "all", "logprobs": True, "top_logprobs": 0, "n": 2, **HOT, "stream": stream}
    for choice in live().body(**fields)["choices"]:
        first, *rest = choice["prompt_logprobs"]
        assert first is None and len(rest) == len(choice["prompt_token_ids"]) - 1
        assert choice["latents"]["shape"][0] == len(choice["prompt_token_ids"]) + len(choice["token_ids"]) - 1
        assert all(entry["top_logprobs"] == [] for entry in choice["logprobs"]["content"])


def test_samples_of_a_stream_come_in_turns() -> None:
    chunks = events(live().ask(stream=True, n=3, prompt_logprobs=0, latents="last", **HOT))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    by_index = [[choice for choice in choices if choice["index"] == index] for index in range(3)]
    order = [choice["index"] for choice in choices]
    assert min(order.index(index) for index in range(3)) == 0
    assert all(order.index(index) < len(order) - 1 - order[::-1].index(other) for index in range(3) for other in range(3))
    for own in by_index:
        assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[-1]["delta"] == {}
        assert ["role" in choice["delta"] for choice in own] == [True, *[False] * (len(own) - 1)]
        for key, place in (("prompt_token_ids", 0), ("prompt_logprobs", 0), ("latents", len(own) - 1)):
            assert [key in choice for choice in own] == [position == place for position in range(len(own))], key
        assert [choice["finish_reason"] for choice in own] == [*[None] * (len(own) - 1), "length"]


def test_usage_of_a_stream() -> None:
    (bare, only_last, every, both) = (
        events(live().ask(stream=True, n=2, stream_options=options))
        for options in (
            None,
            {"include_usage": True},
            {"continuous_usage_stats": True},
            {"include_usage": True, "continuous_usage_stats": True},
        )
    )
    assert not any("usage" in chunk for chunk in bare)
    assert all(chunk["usage"] is None for chunk in only_last[:-1]) and only_last[-1]["choices"] == []
    assert all(chunk["choices"] for chunk in every) and both[-1]["choices"] == []
    for chunks in (every, both):
        told, sent = [], 0
        for chunk in chunks:
            sent += sum(len(choice.get("token_ids", ())) for choice in chunk["choices"])
            told.append(chunk["usage"]["completion_tokens"])
            assert chunk["usage"]["total_tokens"] == told[-1] + chunk["usage"]["prompt_tokens"]
            assert told[-1] == sent
        assert told[-1] == 24
    assert counts(only_last[-1]) == counts(both[-1]) == counts(live().body(n=2))


@pytest.mark.parametrize("stream", [False, True])
def test_stops_in_the_midst_of_a_text_of_many_tokens(stream: bool) -> None:
    fields = {"allowed_token_ids": [A], "stop": ["aaa"], "stream": stream}
    (choice,) = live().body(**fields)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", "aaa")
    (kept,) = live().body(include_stop_str_in_output=True, **fields)["choices"]
    assert kept["message"]["content"] == "aaa"
    (ended,) = live().body(logit_bias={str(EOS): 100}, stream=stream)["choices"]
    assert (ended["message"]["content"], ended["finish_reason"], ended["stop_reason"]) == ("", "stop", None)
    assert ended["token_ids"] == [EOS]


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_that_is_continued(stream: bool) -> None:
    """The answer is what follows, without what was given, as a completion of the same ids."""
    (choice,) = agree({"messages": TURNS, "continue_final_message": True, "stream": stream})
    given = TOKENIZER.encode("The ", add_bos=False)
    assert choice["prompt_token_ids"][-len(given) :] == given
    assert choice["message"]["content"] and not choice["message"]["content"].startswith("The ")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"structured_outputs": {"choice": ["é, said"]}}, "é, said"),
        ({"structured_outputs": {"regex": "ab{3}c"}}, "abbbc"),
        ({"structured_outputs": {"grammar": 'start: "x" "y"'}}, "xy"),
        ({"structured_outputs": {"json": {"const": [1]}}}, "[1]"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": None}}}}, "null"),
    ],
)
def test_forms_of_output(form: dict[str, Any], text: str, stream: bool) -> None:
    for choice in live().body(n=2, max_tokens=30, stream=stream, temperature=1.5, seed=3, **form)["choices"]:
        assert ("".join(choice["message"]["content"].split()), choice["finish_reason"]) == ("".join(text.split()), "stop")


# Bounds.


def of_chats(field: str) -> bool:
    return field in FIELDS or field in OWN or field in ELSEWHERE


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(
    ("field", "value", "message"), [wrong for wrong in WRONG if of_chats(wrong[0])], ids=lambda value: str(value)[:20]
)
def test_a_wrong_value_is_a_400_that_names_the_field(field: str, value: Any, message: str, lenient: bool) -> None:
    engine = FakeEngine()
    told = assert_envelope(chat(engine, lenient, **{"max_tokens": 16, field: value}), 400, INVALID, field)
    assert f"'{field}'" in told and message in told and len(told) < 300
    assert engine.requests == []


@pytest.mark.parametrize(
    ("field", "fields"), [case for case in OUTSIDE if of_chats(case[0]) and case[1].keys() <= ChatRequest.model_fields.keys()]
)
def test_what_only_the_engine_or_other_fields_make_wrong_is_named_too(field: str, fields: dict[str, Any]) -> None:
    assert_envelope(live().ask(**fields), 400, INVALID, field)


@pytest.mark.parametrize(
    ("field", "fields"),
    [case for case in BOUNDS if of_chats(case[0]) and case[1].keys() <= ChatRequest.model_fields.keys() - {"logprobs"}]
    + [
        ("prompt_logprobs", {"prompt_logprobs": 20, "logprobs": True, "top_logprobs": 20}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 0}),
        ("max_tokens", {"max_tokens": 1}),
        ("max_completion_tokens", {"max_tokens": None, "max_completion_tokens": 1}),
        ("min_tokens", {"max_tokens": None, "max_completion_tokens": 4, "min_tokens": 4}),
        ("n", {"n": 128, "max_tokens": 1}),
    ],
)
def test_bounds_are_allowed(field: str, fields: dict[str, Any]) -> None:
    assert field in fields and live().body(**fields)["choices"]


def test_min_tokens_beyond_what_may_be_generated() -> None:
    fields = {"max_tokens": None, "max_completion_tokens": 4, "min_tokens": 5}
    assert_envelope(live().ask(**fields), 400, INVALID, "min_tokens")
    long = {"messages": [{"role": "user", "content": "a" * 140}], "max_tokens": None, "min_tokens": 30}
    assert_envelope(live().ask(**long), 400, INVALID, "min_tokens")


def test_samples_beyond_what_the_server_takes() -> None:
    assert_envelope(live().ask(n=129), 400, INVALID, "n")
    few = LiveChat(live().model, max_num_seqs=1, max_num_waiting=1)
    assert_envelope(few.ask(n=3), 400, INVALID, "n")


USAGE = {"stream": True, "stream_options": {"include_usage": True}}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "the end:"}]}]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "the end:", "repetition_penalty": 1.0, "max_tokens": 7, "logprobs": None, "ignore_eos": True, **USAGE},
        {"messages": PARTS, "max_completion_tokens": 7, "ignore_eos": True, "temperature": 0, **USAGE},
        {"prompt": "the end:", "max_tokens": 7, "stop": None, "ignore_eos": True, **USAGE},
        {
            **{"messages": PARTS, "max_completion_tokens": 7, "stop": None, "ignore_eos": True, "stream": True},
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ],
    ids=["vllm bench", "vllm bench, chat", "guidellm", "guidellm, chat"],
)
def test_what_load_generators_send(body: dict[str, Any]) -> None:
    """They count on as many tokens as they ask for, and on a last chunk without choices."""
    server = live() if "messages" in body else completions()
    *chunks, last = events(server.post(body)[0])
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 7
    ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert ends == [*[None] * (len(ends) - 1), "length"]
