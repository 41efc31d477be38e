"""The openai client, synchronous, asynchronous and streaming, against the server on a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.server.fakes import FakeEngine, say
from tests.server.test_serving import Running, running


@pytest.fixture
def server() -> Iterator[Running]:
    with running(FakeEngine(say("abc"))) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_completion(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt="hi", logprobs=1, echo=True, extra_body={"top_k": 3})
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason) == ("hiabc", "length")
    assert choice.logprobs is not None and choice.logprobs.text_offset == [0, 0, 1, 2, 3, 4]
    assert completion.usage is not None and completion.usage.total_tokens == 6


def test_stream(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt="hi", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "abc"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3


def test_asynchronous_stream(server: Running) -> None:
    async def read() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
            stream = await client.completions.create(model="tiny", prompt=["a", "b"], stream=True)
            return [f"{chunk.choices[0].index}{chunk.choices[0].text}" async for chunk in stream]

    assert sorted(asyncio.run(read())) == ["0a", "0b", "0c", "1a", "1b", "1c"]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").owned_by == "lrt-server"


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt="hi")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="a" * 64)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="hi", suffix="end")
    assert refused.value.param == "suffix"


def test_error_in_a_stream_is_raised(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = lambda _request: [RuntimeError("secret")]
    with pytest.raises(openai.APIError, match="failed to process"):
        list(client.completions.create(model="tiny", prompt="hi", stream=True))
