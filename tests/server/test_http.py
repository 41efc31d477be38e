"""The HTTP application over a real engine and a tiny model: what a client sees of generation, in every shape of request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from server.engine.async_engine import AsyncEngine
from server.engine.loader import LoadOptions, load_engine
from server.metrics import EngineMetrics
from tests.server.fakes import assert_envelope, events, make_app

T = TypeVar("T")


class Api:
    """One engine, one application; every `run` starts and stops both and then finds all blocks free."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        self.metrics = EngineMetrics("lrt", "tiny", 64)
        self.engine: AsyncEngine = load_engine(
            LoadOptions(checkpoint, dtype="float32", check_invariants=True, **options), self.metrics
        )

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        async def session() -> T:
            app = make_app(self.engine)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client,
            ):
                result = await work(client)
                await self.engine.stop(drain=True)
                return result

        try:
            return asyncio.run(session())
        finally:
            self.engine.is_draining = False
            assert self.engine.engine.blocks.num_free_blocks == self.engine.config.num_blocks

    def complete(self, *bodies: dict[str, Any]) -> list[httpx.Response]:
        """Answers to all of the bodies, sent at once."""

        async def send(client: httpx.AsyncClient) -> list[httpx.Response]:
            calls = [client.post("/v1/completions", json={"model": "tiny", "prompt": "hi", **body}) for body in bodies]
            return await asyncio.gather(*calls)

        return self.run(send)

    def counts(self) -> dict[str, float]:
        """Value of every metric without labels of its own."""
        lines = self.metrics.exposition().decode().splitlines()
        return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if '{engine="0",model_name="tiny"}' in line}


@pytest.fixture
def api(checkpoint: Path) -> Api:
    return Api(checkpoint)


def merged(response: httpx.Response) -> list[dict[str, Any]]:
    """The choices that a stream's chunks make up."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in events(response):
        for choice in chunk["choices"]:
            whole = choices.setdefault(choice["index"], choice)
            if whole is choice:
                continue
            assert whole["finish_reason"] is None
            whole["text"] += choice["text"]
            whole["finish_reason"], whole["stop_reason"] = choice["finish_reason"], choice["stop_reason"]
            for column in whole["logprobs"] or ():
                whole["logprobs"][column] += choice["logprobs"][column]
            whole["token_ids"] += choice["token_ids"]
    return [choices[index] for index in sorted(choices)]


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal choices, logprobs within what another batch may change in float32."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert {**one, "logprobs": None} == {**other, "logprobs": None}
        if one["logprobs"] is None or other["logprobs"] is None:
            assert one["logprobs"] == other["logprobs"]
            continue
        for column in ("tokens", "text_offset"):
            assert one["logprobs"][column] == other["logprobs"][column]
        for column in ("token_logprobs", "top_logprobs"):
            for value, wanted in zip(one["logprobs"][column], other["logprobs"][column], strict=True):
                assert value == wanted if wanted is None else value == pytest.approx(wanted, abs=1e-4)


SHAPES: list[dict[str, Any]] = [
    {},
    {"n": 3, "seed": 7},
    {"prompt": ["one", "two", "3"], "n": 2, "seed": 1, "logprobs": 3},
    {"prompt": [[1, 2, 3], [200]], "echo": True, "logprobs": 0, "temperature": 0},
    {"prompt": "the \u00e9", "echo": True, "logprobs": 20, "temperature": 0},
    {"echo": True, "max_tokens": 0, "logprobs": 2},
    {"ignore_eos": True, "max_tokens": 1000, "seed": 3, "top_k": 5, "top_p": 0.9},
    {"ignore_eos": True, "max_tokens": 40, "seed": 4, "stop": list("aeiou "), "logprobs": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_a_stream_and_a_plain_response_agree(api: Api, shape: dict[str, Any]) -> None:
    body = {"seed": 0, "return_token_ids": True, **shape}
    plain, streamed = api.complete(body, {**body, "stream": True})
    assert_alike(merged(streamed), plain.json()["choices"])
    for choice in plain.json()["choices"]:
        check_choice(api, body, choice)
    usage = plain.json()["usage"]
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in plain.json()["choices"])


def check_choice(api: Api, body: dict[str, Any], choice: dict[str, Any]) -> None:
    ids, prompt_ids = choice["token_ids"], choice["prompt_token_ids"]
    assert len(prompt_ids) + len(ids) <= api.engine.config.max_model_len
    if choice["finish_reason"] == "length":
        room = api.engine.config.max_model_len - len(prompt_ids)
        assert len(ids) == min(body.get("max_tokens", 16), room)
    elif choice["stop_reason"] is not None:
        assert choice["stop_reason"] in body["stop"] and choice["stop_reason"] not in choice["text"]
    if choice["logprobs"] is None:
        return
    entries, counted = choice["logprobs"], [*(prompt_ids if body.get("echo") else []), *ids]
    assert entries["tokens"] == [api.engine.tokenizer.decode([id]) for id in counted]
    for own, top, token in zip(*(entries[key] for key in ("token_logprobs", "top_logprobs", "tokens")), strict=True):
        assert (own is None) == (top is None)
        if own is not None:
            assert own <= top[token] <= 0
            assert len(top) <= body["logprobs"] + 1
    assert entries["text_offset"] == sorted(entries["text_offset"])


def test_greedy_tokens_own_logprob_is_the_largest(api: Api) -> None:
    (response,) = api.complete({"temperature": 0, "logprobs": 1, "max_tokens": 20, "ignore_eos": True})
    logprobs = response.json()["choices"][0]["logprobs"]
    best = [max(top.values()) for top in logprobs["top_logprobs"]]
    assert logprobs["token_logprobs"] == best and len(best) == 20


def test_a_crowd_gets_what_each_gets_alone(api: Api) -> None:
    bodies = [{"prompt": [i % 200, *range(i % 23)], "temperature": 0, "return_token_ids": True} for i in range(40)]
    together = api.complete(*({**body, "stream": index % 2 == 0} for index, body in enumerate(bodies)))
    for index in range(0, 40, 7):
        (alone,) = api.complete(bodies[index])
        crowd = together[index]
        choices = merged(crowd) if index % 2 == 0 else crowd.json()["choices"]
        assert choices[0]["token_ids"] == alone.json()["choices"][0]["token_ids"]


def test_counts_are_exact_and_gauges_end_at_zero(api: Api) -> None:
    bodies = [{"prompt": [1] * size, "max_tokens": 5, "ignore_eos": True, "n": 2} for size in (1, 10, 30)]
    api.complete(*bodies, {"prompt": [1], "echo": True, "max_tokens": 0})
    found = api.counts()
    assert found["lrt:generation_tokens_total"] == 3 * 2 * 5
    assert found["lrt:prompt_tokens_total"] == (1 + 10 + 30) + 1, "samples share one read"
    assert found["lrt:request_prompt_tokens_count"] == found["lrt:e2e_request_latency_seconds_count"] == 7
    assert found["lrt:time_to_first_token_seconds_count"] == 6
    assert found["lrt:inter_token_latency_seconds_count"] == 6 * 4
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "latent_bytes"):
        assert found[f"lrt:{gauge}"] == 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_shows_in_no_answer_and_no_count(api: Api, checkpoint: Path, prefix_caching: bool) -> None:
    tight = Api(
        checkpoint,
        kv_cache_memory=50_000,
        block_size=4,
        max_num_seqs=6,
        prefill="sequential",
        prefix_caching=prefix_caching,
    )
    fields = {"max_tokens": 20, "ignore_eos": True, "temperature": 0, "echo": True, "logprobs": 1}
    bodies = [{"prompt": [(i * 7 + j) % 200 for j in range(40)], **fields} for i in range(6)]
    for crowded, roomy in zip(tight.complete(*bodies), api.complete(*bodies), strict=True):
        assert_alike(crowded.json()["choices"], roomy.json()["choices"])
    found = tight.counts()
    assert found["lrt:num_preemptions_total"] > 0
    assert prefix_caching or found["lrt:recomputed_tokens_total"] > 0
    assert found["lrt:prompt_tokens_total"] == 6 * 40
    assert found["lrt:refinement_passes_count"] == 6
    assert found["lrt:generation_tokens_total"] == 6 * 20


def test_wrong_requests_do_not_disturb_right_ones(api: Api) -> None:
    wrong = [{"prompt": [999]}, {"prompt": []}, {"model": "x"}, {"top_p": 0}, {"suffix": "a"}, {"prompt": [1] * 65}]
    right = {"temperature": 0}
    *refused, answered = api.complete(*wrong, right)
    assert [response.status_code for response in refused] == [400, 400, 404, 400, 400, 400]
    (alone,) = api.complete(right)
    assert answered.json()["choices"] == alone.json()["choices"]


def test_what_exceeds_the_cache_is_refused(checkpoint: Path) -> None:
    api = Api(checkpoint, kv_cache_memory=20_000, block_size=4)
    assert api.engine.config.capacity < 64
    prompt = [1] * api.engine.config.capacity
    (response,) = api.complete({"prompt": prompt})
    assert_envelope(response, 400, "invalid_request_error", "prompt")


def test_a_full_queue_is_a_429(checkpoint: Path) -> None:
    api = Api(checkpoint, max_num_seqs=1, max_num_waiting=1)
    responses = api.complete(*[{"ignore_eos": True}] * 3)
    refused = [response for response in responses if response.status_code != 200]
    assert len(refused) == 1
    assert_envelope(refused[0], 429, "queue_full")


@pytest.mark.parametrize("stream", [False, True])
def test_blocks_are_free_after_the_client_left(checkpoint: Path, stream: bool) -> None:
    api = Api(checkpoint, max_model_len=100_000, kv_cache_memory=100_000_000)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 90_000, "ignore_eos": True, "stream": stream, "n": 2}

    async def leave(_client: httpx.AsyncClient) -> None:
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}

        async def drop(_message: Any) -> None:
            await asyncio.sleep(0)

        task = asyncio.ensure_future(make_app(api.engine)(scope, inbox.get, drop))
        while api.engine.engine.blocks.usage == 0:
            await asyncio.sleep(0.001)
        inbox.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(task, 10)
        assert api.engine.num_in_flight == 0

    api.run(leave)
    assert 'finished_reason="abort",model_name="tiny"} 2.0' in api.metrics.exposition().decode()
