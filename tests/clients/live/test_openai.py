"""The openai client: synchronous, asynchronous, streaming, chat."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from .conftest import MODEL, Direct

PROMPT = "def fibonacci(n):"


@pytest.fixture
def client(v1: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=v1, max_retries=0) as client:
        yield client


def test_greedy_text_is_the_model_s(client: openai.OpenAI, direct: Direct) -> None:
    prompts = [PROMPT, "import ", "# Grüße, 日本"]
    completion = client.completions.create(model=MODEL, prompt=prompts, max_tokens=24, temperature=0, stop=["\n\n", "zz"])
    wanted = direct.ask(greedy=[[prompt, 24, ["\n\n", "zz"]] for prompt in prompts])["greedy"]
    assert [choice.text for choice in completion.choices] == wanted
    assert completion.usage is not None and completion.usage.total_tokens > 24


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    for n in (1, 3):
        plain = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=32, seed=5, n=n)
        texts = [""] * n
        ends: list[int] = []
        usages = []
        with client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=32, seed=5, n=n, stream=True, stream_options={"include_usage": True}
        ) as stream:
            for chunk in stream:
                usages += [chunk.usage] if chunk.usage is not None else []
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
                    ends += [choice.index] if choice.finish_reason is not None else []
        assert texts == [choice.text for choice in plain.choices]
        assert sorted(ends) == list(range(n))
        assert plain.usage is not None and [usage.completion_tokens for usage in usages] == [plain.usage.completion_tokens]


def test_asynchronous_requests_do_not_see_each_other(v1: str, client: openai.OpenAI) -> None:
    prompts = [f"def function_{number}(" for number in range(20)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=v1, max_retries=0) as client:

            async def ask(prompt: str) -> str:
                stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(ask, prompts))

    alone = [client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0) for prompt in prompts]
    assert asyncio.run(ask_all()) == [completion.choices[0].text for completion in alone]


def test_echoed_logprobs_add_up(client: openai.OpenAI, direct: Direct) -> None:
    continuation = "\n    return n"
    completion = client.completions.create(
        model=MODEL, prompt=PROMPT + continuation, max_tokens=0, echo=True, logprobs=2, temperature=0
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.text_offset is not None
    assert logprobs.tokens is not None and logprobs.token_logprobs[0] is None
    wanted = direct.ask(loglikelihoods=[["", PROMPT + continuation]])["loglikelihoods"][0][0]
    assert sum(logprobs.token_logprobs[1:]) == pytest.approx(wanted, abs=1e-3)
    text = PROMPT + continuation
    for token, offset in list(zip(logprobs.tokens, logprobs.text_offset, strict=True))[1:]:
        assert text[offset : offset + len(token)] == token


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="a b " * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError) as stranger:
        client.with_options(api_key="sk-other").completions.create(model=MODEL, prompt="hi")
    assert stranger.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="hi")
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model=MODEL, prompt="hi", extra_body={"temprature": 1})
    assert unknown.value.param == "temprature"


def test_chat(chat: str) -> None:
    messages = [{"role": "user", "content": "print("}]
    with openai.OpenAI(base_url=chat, max_retries=0) as client:
        plain = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=16, temperature=0)  # type: ignore[arg-type]
        text = ""
        stream = client.chat.completions.create(
            model=MODEL,
            messages=messages,  # type: ignore[arg-type]
            max_completion_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        usages = []
        for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usages += [chunk.usage] if chunk.usage is not None else []
    assert text == plain.choices[0].message.content
    assert plain.choices[0].message.role == "assistant" and len(usages) == 1
