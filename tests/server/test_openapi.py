"""The OpenAPI document: complete, true to what routes take and answer, shown by a page that needs nothing from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from server.api import responses
from server.api.openapi import OPERATIONS
from server.api.openapi import PAGE as PAGE_FILE
from server.metrics import EngineMetrics
from tests.server.fakes import NAME, FakeEngine, call, chat, complete, events, make_app, say
from tests.server.live import Live, LiveChat

README = Path(__file__).parents[2] / "README.md"
APP = make_app(FakeEngine())
DOCUMENT: dict[str, Any] = call(APP, "GET", "/openapi.json").json()
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
ALL = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(item) for item in value.values()))
    return set().union(*(references(item) for item in value)) if isinstance(value, list) else set()


def test_every_route_is_in_it() -> None:
    served = {
        (re.sub(r":path}", "}", route.path), method.lower())
        for route in APP.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert served == set(ALL)


def test_references_lead_somewhere_and_every_schema_is_used() -> None:
    assert references(DOCUMENT) == {f"#/components/schemas/{name}" for name in SCHEMAS}


def test_every_operation_says_what_it_answers() -> None:
    for path, method in ALL:
        operation = DOCUMENT["paths"][path][method]
        assert operation["summary"] and operation["tags"][0] in {tag["name"] for tag in DOCUMENT["tags"]}
        assert "200" in operation["responses"]
        for status, answer in operation["responses"].items():
            if status != "200" and method != "head":
                assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Error")


@pytest.mark.parametrize("name", ["CompletionRequest", "ChatRequest", "TokenizeRequest", "DetokenizeRequest", "Message"])
def test_every_field_is_described_and_optional_ones_may_be_null(name: str) -> None:
    schema = SCHEMAS[name]
    assert schema["additionalProperties"] == {"type": "null"}
    for field, says in schema["properties"].items():
        assert says["description"], field
        assert ({"type": "null"} in says.get("anyOf", ())) == (field not in schema.get("required", ())), field


BODIES = [(path, name) for path, operation in OPERATIONS.items() for name in operation.examples]


@pytest.mark.parametrize(("path", "name"), BODIES)
def test_examples_of_bodies_are_answered_as_promised(path: str, name: str) -> None:
    example = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"][name]["value"]
    assert example.get("model", NAME) == NAME
    response, operation = call(APP, "POST", path, json=example), OPERATIONS[path]
    assert response.status_code == 200, response.text
    if not example.get("stream"):
        assert operation.answer is not None
        operation.answer.model_validate_json(response.content, strict=True)
        return
    chunks = events(response)
    assert operation.stream is not None and chunks
    for chunk in chunks:
        operation.stream.model_validate(chunk, strict=True)


def test_requests_of_the_readme_are_taken() -> None:
    bodies = re.findall(r"curl http://127\.0\.0\.1:8000(/\S+) .*?-d '(.*?)'\n", README.read_text("utf-8"), re.DOTALL)
    assert len(bodies) >= 2
    for path, body in bodies:
        fields = {**json.loads(body), "model": NAME}
        assert call(make_app(FakeEngine(say("{}"))), "POST", path, json=fields).status_code == 200, body


@pytest.mark.parametrize(
    ("fields", "extras"),
    [
        ({"return_token_ids": True}, {"token_ids", "prompt_token_ids"}),
        ({"prompt_logprobs": 1}, {"prompt_logprobs"}),
        ({"latents": "all"}, {"latents"}),
    ],
)
@pytest.mark.parametrize("live", [Live(), LiveChat()], ids=["completions", "chat"])
def test_all_that_a_choice_can_carry_is_described(live: Live, fields: dict[str, Any], extras: set[str]) -> None:
    bare = {**fields, "return_token_ids": fields.get("return_token_ids", False)}
    model = responses.ChatResponse if isinstance(live, LiveChat) else responses.CompletionResponse
    answer = model.model_validate(live.body(**bare), strict=True)
    (choice,) = answer.choices
    told = {"index", "logprobs", "finish_reason", "stop_reason", "message" if isinstance(live, LiveChat) else "text"}
    assert choice.model_fields_set == told | extras
    assert choice.model_extra is None and set(live.body(**bare)["choices"][0]) == told | extras


@pytest.mark.parametrize("path", [path for path, operation in OPERATIONS.items() if operation.tag != "documents"])
def test_every_body_and_answer_has_an_example_of_the_shape_that_is_promised(path: str) -> None:
    operation = OPERATIONS[path]
    assert operation.body is None or operation.examples
    if operation.answer is None:
        assert operation.example.splitlines()[0] in EngineMetrics("lrt", NAME, 64).exposition().decode().splitlines()
    else:
        TypeAdapter(operation.answer).validate_python(operation.example, strict=True)


@pytest.mark.parametrize("path", [path for path, operation in OPERATIONS.items() if operation.stream])
def test_examples_of_streams_are_events_of_the_shape_that_is_promised(path: str) -> None:
    says = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    event, done, rest = says["example"].split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    stream = OPERATIONS[path].stream
    assert stream is not None
    assert stream.model_validate_json(event.removeprefix("data: "), strict=True).model_extra is None


@pytest.mark.parametrize("path", [path for path, item in OPERATIONS.items() if item.body is None])
def test_answers_have_the_shape_that_is_promised(path: str) -> None:
    response = call(APP, "GET", path.replace("{name}", NAME))
    assert response.status_code == 200
    assert response.headers["content-type"].split(";")[0] == OPERATIONS[path].media_type
    answer = OPERATIONS[path].answer
    if answer is not None:
        TypeAdapter(answer).validate_json(response.content, strict=True)


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"return_token_ids": True}])
def test_generated_answers_have_the_shape_that_is_promised(fields: dict[str, Any]) -> None:
    for more in ({}, {"logprobs": 1}, {"logprobs": 1, "echo": True}):
        plain = complete(FakeEngine(say("é")), **fields, **more)
        responses.CompletionResponse.model_validate_json(plain.content, strict=True)
        for chunk in events(complete(FakeEngine(say("é")), stream=True, **fields, **more)):
            responses.CompletionResponse.model_validate(chunk, strict=True)
    for more in ({}, {"logprobs": True, "top_logprobs": 2}):
        responses.ChatResponse.model_validate_json(chat(FakeEngine(say("é")), **fields, **more).content, strict=True)
        for chunk in events(chat(FakeEngine(say("é")), stream=True, **fields, **more)):
            responses.ChatChunk.model_validate(chunk, strict=True)


def test_errors_have_the_shape_that_is_promised() -> None:
    for response in (complete(FakeEngine(), model="other"), chat(FakeEngine(), tools=[]), call(APP, "GET", "/nowhere")):
        responses.Error.model_validate_json(response.content, strict=True)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    response = call(APP, "GET", "/docs")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert response.content == PAGE_FILE.read_bytes()
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = response.text
    assert re.findall(r"https?://|//cdn|\bsrc=|@import|<link", page) == []
    assert "innerHTML" not in page
    assert set(re.findall(r'fetch\("([^"]+)"', page)) == {"openapi.json"}
