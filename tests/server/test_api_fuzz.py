"""Thousands of bodies, from valid to none at all: only documented answers come, and the engine is whole afterwards."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from server.api.chat_schemas import ChatRequest
from server.api.schemas import CompletionRequest
from server.api.tokenization import DetokenizeRequest, TokenizeRequest
from tests.server.bodies import dump, foreign, mutated, valid
from tests.server.fakes import NAME, assert_envelope, events, make_app
from tests.server.test_http import Api

ROUTES: dict[str, tuple[type[BaseModel], int]] = {
    "/v1/completions": (CompletionRequest, 2000),
    "/v1/chat/completions": (ChatRequest, 500),
    "/tokenize": (TokenizeRequest, 500),
    "/detokenize": (DetokenizeRequest, 500),
}
"""What each route takes, and how many bodies it gets."""
NUM_AT_ONCE = 10
STATUSES = {200, 400, 404, 413, 429}
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "latent_bytes")


def check_answer(response: httpx.Response) -> str:
    """What came is one of the documented answers, well-formed; returns what it was, in a word."""
    assert response.status_code in STATUSES, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert_envelope(response, response.status_code, error["code"], error["param"])
        assert error["code"] is None or isinstance(error["code"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        assert len(response.content) < 10_000, "a refusal does not repeat what it refuses at length"
        return str(response.status_code)
    if response.headers["content-type"] == "application/json":
        answer = response.json()
        if "choices" not in answer:
            return "plain"
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
        assert all(choice["finish_reason"] in ("stop", "length") for choice in answer["choices"])
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        return "plain"
    chunks = events(response)
    assert not any("error" in chunk for chunk in chunks)
    ended = Counter(choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"])
    assert ended and set(ended.values()) == {1}
    return "stream"


@pytest.mark.slow
@pytest.mark.parametrize("route", sorted(ROUTES))
def test_any_body_gets_a_documented_answer(route: str, checkpoint: Path) -> None:
    kind, num_bodies = ROUTES[route]
    api = Api(checkpoint, max_num_seqs=3, max_num_waiting=2)
    seen: Counter[str] = Counter()

    async def post(client: httpx.AsyncClient, bodies: list[bytes]) -> list[httpx.Response]:
        calls = [client.post(route, content=body) for body in bodies]
        return await asyncio.wait_for(asyncio.gather(*calls), 120)

    strangers = st.builds(lambda body, name: {**body, "model": name}, valid(kind), st.sampled_from([NAME, NAME, "nobody"]))
    body = st.one_of(strangers.map(dump), mutated(kind).map(dump), foreign(kind))

    @settings(max_examples=num_bodies // NUM_AT_ONCE, suppress_health_check=list(HealthCheck))
    @given(st.lists(body, min_size=NUM_AT_ONCE, max_size=NUM_AT_ONCE))
    def bombard(bodies: list[bytes]) -> None:
        responses = api.run(lambda client: post(client, bodies))  # which finds all blocks free afterwards
        seen.update(map(check_answer, responses))
        assert api.engine.error is None and api.engine.num_in_flight == 0
        found = api.counts()
        assert {gauge: found[f"lrt:{gauge}"] for gauge in GAUGES} == dict.fromkeys(GAUGES, 0)

    bombard()
    api.engine.engine.scheduler.check_invariants()
    assert seen.total() >= num_bodies
    generating = ("stream", "404", "413", "429") if "stream" in kind.model_fields else ()
    assert min(seen[answer] for answer in ("plain", "400", *generating)) >= num_bodies // 500, seen
    (alone,) = api.complete({"temperature": 0})
    (fresh,) = Api(checkpoint).complete({"temperature": 0})
    assert alone.json()["choices"] == fresh.json()["choices"], "what came before leaves no trace"


def test_every_route_that_takes_a_body_is_fuzzed(checkpoint: Path) -> None:
    routes = make_app(Api(checkpoint).engine).routes
    assert {route.path for route in routes if isinstance(route, APIRoute) and "POST" in route.methods} == set(ROUTES)
