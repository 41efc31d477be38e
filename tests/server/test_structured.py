"""Output in a given form, over HTTP with the bundled model: what comes is valid, what cannot be had is a 400 that names it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jsonschema_rs
import pytest

from lrt_core.checkpoint import BUNDLED
from server.api import responses
from server.engine.async_engine import AsyncEngine
from server.engine.loader import LoadOptions, load_engine
from server.engine.request import Delta, GenerationRequest, RequestError
from tests.server.fakes import FakeEngine, Step, assert_envelope, complete, events, make_app
from tests.server.live import joined

Client = httpx.AsyncClient
NUM_EACH = 100
PROMPTS = ("config = ", "def parse(text):\n    return ", "# The answer is ", "import ", "x = {")


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[AsyncEngine, Client]]:
    engine = load_engine(LoadOptions(BUNDLED, dtype="float32", check_invariants=True))
    await engine.start()
    try:
        transport = httpx.ASGITransport(make_app(engine, max_body_size=2**20), raise_app_exceptions=False)
        async with Client(transport=transport, base_url="http://test", timeout=None) as client:
            yield engine, client
    finally:
        await engine.stop(drain=False)
    assert engine.engine.blocks.num_free_blocks == engine.config.num_blocks


def served(play: Callable[[AsyncEngine, Client], Awaitable[None]]) -> None:
    """Run `play` against the bundled model behind the HTTP application."""

    async def run() -> None:
        async with serving() as (engine, client):
            await play(engine, client)

    asyncio.run(run())


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x = ", "max_tokens": 200, **fields}


async def post(client: Client, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=body(**fields))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def schemas() -> Iterator[dict[str, Any]]:
    """As many as are tested, of every kind of value and of growing bounds."""
    for number in range(NUM_EACH):
        bound = number % 9 + 1
        yield [
            {"type": "integer", "minimum": -bound, "maximum": 10 * bound},
            {"type": "string", "minLength": 1, "maxLength": bound},
            {"enum": [f"value {i}" for i in range(bound)] + [None, True, 1.5]},
            {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": bound},
            record(name={"type": "string", "maxLength": bound}, age={"type": "integer", "minimum": 0, "maximum": 150}),
            record(kind={"const": "point"}, at=record(x={"enum": [0, bound]}, y={"type": "null"})),
            {"type": "string", "pattern": f"^[A-F]{{{bound}}}-[0-9]{{2}}$"},
            {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"enum": ["é", "\n"]}, "maxItems": bound}]},
            {"$ref": "#/$defs/pair", "$defs": {"pair": record(left={"enum": [bound]}, right={"type": "boolean"})}},
            {"type": "string", "format": "date"},
        ][number % 10]


def regexes() -> Iterator[str]:
    for number in range(NUM_EACH):
        bound = number % 9 + 1
        yield [
            rf"[a-z]{{{bound}}}=[0-9]{{1,5}}?;",
            rf"\d{{1,{bound}}}(\.\d{{2}})?",
            r"(yes|no)(, (yes|no)){0,3}",
            rf"é{{{bound}}}😀?!",
        ][number % 4]


def choices() -> Iterator[list[str]]:
    for number in range(NUM_EACH):
        yield [
            ["red", "green", "blue"],
            ['say "hi"', "a\\b", "€\n"],
            [f"option {i}" for i in range(number + 1)],
            ["one", "one more"],
        ][number % 4]


SUM = 'start: term ("+" term){0,3}\nterm: NUMBER | "(" NUMBER "*" NUMBER ")"\nNUMBER: /[1-9][0-9]{0,2}/'
SELECT = 'root ::= "SELECT " column " FROM " table\ncolumn ::= "id" | "name" | "*"\ntable ::= [a-z] [a-z] [a-z]'
NEST = 'start: "(" inner ")" | X\ninner: "[" item ("," item){0,2} "]"\nitem: X | "<" X ">"\nX: /x{1,3}/'


def grammars() -> Iterator[tuple[str, Callable[[str], object]]]:
    """Each with a judge of its texts."""
    number = r"[1-9][0-9]{0,2}"
    term, item = rf"({number}|\({number}\*{number}\))", "(x{1,3}|<x{1,3}>)"
    for index in range(NUM_EACH):
        yield [
            (SUM, re.compile(rf"{term}(\+{term}){{0,3}}").fullmatch),
            (SELECT, re.compile(r"SELECT (id|name|\*) FROM [a-z]{3}").fullmatch),
            (NEST, re.compile(rf"x{{1,3}}|\(\[{item}(,{item}){{0,2}}\]\)").fullmatch),
        ][index % 3]


def cases() -> list[tuple[dict[str, Any], Callable[[str], object]]]:
    """Fields of a request, and a judge of its text."""
    found: list[tuple[dict[str, Any], Callable[[str], object]]] = []
    for number, schema in enumerate(schemas()):
        form = {"type": "json_schema", "json_schema": {"name": "test", "schema": schema, "strict": True}}
        fields = {"response_format": form} if number % 3 == 0 else {"structured_outputs": {"json": schema}}
        validator = jsonschema_rs.validator_for(schema)
        found.append((fields, lambda text, validator=validator: validator.is_valid(json.loads(text))))
    found += [({"structured_outputs": {"regex": text}}, re.compile(text).fullmatch) for text in regexes()]
    found += [({"structured_outputs": {"choice": texts}}, texts.__contains__) for texts in choices()]
    found += [({"structured_outputs": {"grammar": text}}, judge) for text, judge in grammars()]
    return found


@pytest.mark.slow
def test_a_hundred_of_every_form_are_valid_hot_and_cold() -> None:
    async def play(engine: AsyncEngine, client: Client) -> None:
        async def check(number: int, fields: dict[str, Any], judge: Callable[[str], object]) -> None:
            temperature = (0.0, 1.0, 1.5, 1.5)[number // 10 % 4]
            prompt = PROMPTS[number % len(PROMPTS)]
            [choice] = (await post(client, prompt=prompt, temperature=temperature, seed=number, **fields))["choices"]
            assert choice["finish_reason"] == "stop", (fields, choice)
            assert judge(choice["text"]), (fields, choice)

        found = cases()
        assert len(found) == 4 * NUM_EACH
        await asyncio.gather(*(check(number, *case) for number, case in enumerate(found)))

    served(play)


def test_any_json_object() -> None:
    async def play(engine: AsyncEngine, client: Client) -> None:
        form = {"type": "json_object"}
        answer = await post(client, response_format=form, n=4, temperature=1.0, seed=3, max_tokens=400)
        ended = [choice["text"] for choice in answer["choices"] if choice["finish_reason"] == "stop"]
        assert ended
        assert all(isinstance(json.loads(text), dict) for text in ended)
        assert await post(client, response_format={"type": "text"}, temperature=0, max_tokens=5)

    served(play)


def test_a_stream_says_the_same() -> None:
    async def play(engine: AsyncEngine, client: Client) -> None:
        fields = body(structured_outputs={"json": record(a={"type": "string", "maxLength": 20})}, n=2, seed=1)
        whole = await client.post("/v1/completions", json=fields)
        stream = await client.post("/v1/completions", json={**fields, "stream": True})
        texts = {0: "", 1: ""}
        for event in events(stream):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        assert [choice["text"] for choice in whole.json()["choices"]] == [texts[0], texts[1]]
        assert all("a" in json.loads(text) for text in texts.values())

    served(play)


def test_a_chat_s_answer_has_the_form() -> None:
    async def play(engine: AsyncEngine, client: Client) -> None:
        form = {
            "type": "json_schema",
            "json_schema": {"name": "test", "schema": record(a={"enum": [1, 2]}, b={"type": "boolean"})},
        }
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "temperature": 1.5, "seed": 4, "n": 3}
        response = await client.post("/v1/chat/completions", json={**chat, "response_format": form})
        assert response.status_code == 200, response.text
        for choice in response.json()["choices"]:
            assert choice["finish_reason"] == "stop"
            assert set(json.loads(choice["message"]["content"])) == {"a", "b"}
        refused = await client.post("/v1/chat/completions", json={**chat, "structured_outputs": {"regex": "(a"}})
        assert_envelope(refused, 400, "invalid_request_error", "structured_outputs.regex")

    served(play)


def test_a_stop_string_cuts_the_text_off() -> None:
    async def play(engine: AsyncEngine, client: Client) -> None:
        [choice] = (await post(client, structured_outputs={"regex": "abc=[0-9]{5}"}, stop="="))["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abc", "stop", "=")

    served(play)


def test_a_form_that_grows_too_complex_ends_its_request_alone() -> None:
    async def play(engine: AsyncEngine, client: Client) -> None:
        endless = body(structured_outputs={"grammar": 'start: a\na: "x" a'}, n=2, max_tokens=450)
        other = asyncio.ensure_future(post(client, max_tokens=450, ignore_eos=True))
        failed, stream = await asyncio.gather(
            client.post("/v1/completions", json=endless), client.post("/v1/completions", json={**endless, "stream": True})
        )
        message = assert_envelope(failed, 400, "invalid_request_error", "structured_outputs.grammar")
        assert "cannot be followed further" in message
        assert "cannot be followed further" in events(stream)[-1]["error"]["message"]
        assert (await other)["usage"]["completion_tokens"] == 450
        assert engine.num_in_flight == 0
        assert (await post(client, structured_outputs={"choice": ["a"]}))["choices"][0]["text"] == "a"

    served(play)


SPLIT = {"structured_outputs": {"grammar": 'start: "1" | a\na: "x" a'}}
"""Some samples end at once, others go on for ever, until that is too much."""


def test_a_sample_that_cannot_go_on_ends_alone() -> None:
    async def play(engine: AsyncEngine, client: Client) -> None:
        fields = {**SPLIT, "n": 6, "temperature": 1.5, "seed": 1, "max_tokens": 450, "latents": "last"}
        plain = await post(client, **fields)
        failed = [choice for choice in plain["choices"] if choice["finish_reason"] == "abort"]
        assert 0 < len(failed) < 6
        for choice in failed:
            assert set(choice["text"]) == {"x"} and choice["latents"] is None
            assert (
                choice["error"]["param"] == "structured_outputs.grammar" and choice["error"]["code"] == "invalid_request_error"
            )
            assert "cannot be followed further" in choice["error"]["message"]
        for choice in plain["choices"]:
            assert choice in failed or ("error" not in choice and (choice["text"], choice["finish_reason"]) == ("1", "stop"))
        stream = await client.post("/v1/completions", json=body(**fields, stream=True))
        assert joined(events(stream))["choices"] == plain["choices"]
        best = await post(client, **{**fields, "n": 2, "best_of": 6})
        assert [choice["text"] for choice in best["choices"]] == ["1", "1"]
        chat = {"messages": [{"role": "user", "content": "hi"}], **fields, "n": 20, "max_tokens": 300}
        answers = (await client.post("/v1/chat/completions", json=chat)).json()["choices"]
        assert {choice["finish_reason"] for choice in answers} == {"stop", "abort"}
        assert all(("error" in choice) == (choice["finish_reason"] == "abort") for choice in answers)
        chunks = [
            choice
            for chunk in events(await client.post("/v1/chat/completions", json={**chat, "stream": True}))
            for choice in chunk["choices"]
        ]
        ends = {choice["index"]: choice for choice in chunks if choice["finish_reason"] is not None}
        assert all(ends[choice["index"]].get("error") == choice.get("error") for choice in answers)
        assert sum("error" in choice for choice in chunks) == sum("error" in choice for choice in answers)

    served(play)


def test_a_prompt_whose_samples_cannot_go_on_leaves_the_others_alone() -> None:
    """Where all of them fail the call does, which the test above this one shows."""

    def script(request: GenerationRequest) -> list[Step]:
        if len(request.prompt_ids) > 1:
            return [Delta(0, "a", [97], finish_reason="length")]
        return [
            Delta(0, "x", [120]),
            Delta(0, finish_reason="abort", error=RequestError("too much", "structured_outputs.regex")),
        ]

    both: dict[str, Any] = {"prompt": [[1], [1, 2]], "structured_outputs": {"regex": "x*"}}
    plain = complete(FakeEngine(script), **both).json()
    assert [(choice["text"], choice["finish_reason"]) for choice in plain["choices"]] == [("x", "abort"), ("a", "length")]
    assert plain["choices"][0]["error"]["message"] == "too much" and plain["usage"]["completion_tokens"] == 2
    assert joined(events(complete(FakeEngine(script), stream=True, **both)))["choices"] == plain["choices"]
    responses.CompletionResponse.model_validate(plain, strict=True)
    assert_envelope(complete(FakeEngine(script), prompt=[[1], [1]]), 400, "invalid_request_error", "structured_outputs.regex")
    *_, last = events(complete(FakeEngine(script), prompt=[[1], [1]], stream=True))
    assert last["error"]["message"] == "too much"


def test_a_server_that_shuts_down_compiles_nothing() -> None:
    async def play(engine: AsyncEngine, client: Client) -> None:
        await post(client, structured_outputs={"choice": ["a"]})
        await asyncio.gather(engine.stop(), engine.stop())
        response = await client.post("/v1/completions", json=body(structured_outputs={"choice": ["b"]}))
        assert_envelope(response, 503, "draining")

    served(play)


def test_hostile_forms_are_refused_while_others_are_served() -> None:
    hostile: dict[str, dict[str, Any]] = {
        "structured_outputs.json": {"structured_outputs": {"json": {"type": "integer", "multipleOf": 9999991}}},
        "structured_outputs.regex": {"structured_outputs": {"regex": " {1000000}"}},
        "structured_outputs.choice": {"structured_outputs": {"choice": ["x" * 70_000]}},
        "structured_outputs.grammar": {"structured_outputs": {"grammar": "start: " + "(" * 30_000}},
        "response_format.json_schema.schema": {
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "foo"}}}
        },
    }

    async def play(engine: AsyncEngine, client: Client) -> None:
        other = asyncio.ensure_future(post(client, max_tokens=50, ignore_eos=True))
        for field, fields in hostile.items():
            response = await client.post("/v1/completions", json=body(**fields))
            assert_envelope(response, 400, "invalid_request_error", field)
        assert (await other)["usage"]["completion_tokens"] == 50
        assert engine.num_in_flight == 0

    served(play)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": None}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs.json"),
        ({"structured_outputs": {"grammar": 1}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"type": "object", "dependentRequired": {}}}}, "structured_outputs.json"),
    ],
)
def test_what_is_no_form_is_a_400_that_names_it(fields: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    assert_envelope(complete(engine, **fields), 400, "invalid_request_error", param)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, "json", '{"type":"integer"}'),
        ({"structured_outputs": {"json": {"type": "null"}, "regex": None}}, "json", '{"type":"null"}'),
        ({"structured_outputs": {"choice": ["é"]}}, "choice", '["é"]'),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, "regex", "a"),
        ({"response_format": {"type": "json_object"}}, "json", '{"type":"object"}'),
    ],
)
def test_every_sample_gets_the_grammar(fields: dict[str, Any], kind: str, text: str) -> None:
    engine = FakeEngine()
    assert complete(engine, prompt=["a", "b"], **fields).status_code == 200
    for request in engine.requests:
        assert request.grammar is not None
        assert (request.grammar.source.kind, request.grammar.source.text) == (kind, text)


def test_without_a_form_there_is_no_grammar() -> None:
    engine = FakeEngine()
    assert complete(engine, response_format={"type": "text"}, structured_outputs=None).status_code == 200
    assert engine.requests[0].grammar is None
