"""LiteLLM: it must recognise what the server refuses, a prompt beyond the context above all."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
import pytest

from .conftest import KEY, MODEL, Direct


def complete(v1: str, prompt: str, **options: Any) -> Any:
    return litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", api_base=v1, api_key=KEY, prompt=prompt, max_retries=0, **options
    )


def test_completion(v1: str, direct: Direct) -> None:
    answer = complete(v1, "import os\n", max_tokens=12, temperature=0)
    assert answer.choices[0].text == direct.ask(greedy=[["import os\n", 12, []]])["greedy"][0]
    assert answer.usage.completion_tokens == 12


def test_stream(v1: str) -> None:
    chunks = complete(v1, "import os\n", max_tokens=12, temperature=0, stream=True)
    text = "".join(chunk.choices[0].text or "" for chunk in chunks)
    assert text == complete(v1, "import os\n", max_tokens=12, temperature=0).choices[0].text


def test_asynchronous(v1: str) -> None:
    async def ask() -> Any:
        return await litellm.atext_completion(
            model=f"text-completion-openai/{MODEL}", api_base=v1, api_key=KEY, prompt="x = ", max_tokens=4, seed=3
        )

    assert asyncio.run(ask()).choices[0].text == complete(v1, "x = ", max_tokens=4, seed=3).choices[0].text


def test_a_prompt_beyond_the_context_is_known_as_such(v1: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        complete(v1, "a b " * 2000)


def test_an_unknown_model_is_known_as_such(v1: str) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.text_completion(model="text-completion-openai/other", api_base=v1, api_key=KEY, prompt="hi", max_retries=0)


def test_chat(chat: str) -> None:
    def ask(**options: Any) -> Any:
        messages = [{"role": "user", "content": "print("}]
        return litellm.completion(
            model=f"openai/{MODEL}", api_base=chat, api_key=KEY, messages=messages, temperature=0, max_tokens=12, **options
        )

    answer = ask().choices[0].message.content
    assert answer and answer == "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True))
