"""langchain-openai: its completion model sends prompts in batches of twenty and takes choices by their position."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

from .conftest import KEY, MODEL, Direct


@pytest.fixture
def model(v1: str) -> OpenAI:
    return OpenAI(model=MODEL, base_url=v1, api_key=KEY, max_tokens=10, temperature=0, max_retries=0, top_p=1)  # type: ignore[arg-type, call-arg]


def test_invoke_stream_and_stop(model: OpenAI, direct: Direct) -> None:
    wanted = direct.ask(greedy=[["class Node", 10, []], ["class Node", 10, [":"]]])["greedy"]
    assert model.invoke("class Node") == wanted[0]
    assert "".join(model.stream("class Node")) == wanted[0]
    assert model.invoke("class Node", stop=[":"]) == wanted[1]


def test_more_prompts_than_one_request_holds(model: OpenAI, direct: Direct) -> None:
    prompts = [f"x{number} = " for number in range(45)]
    result = model.generate(prompts)
    wanted = direct.ask(greedy=[[prompt, 10, []] for prompt in prompts])["greedy"]
    assert [generations[0].text for generations in result.generations] == wanted
    assert result.llm_output is not None and result.llm_output["token_usage"]["completion_tokens"] > 45
    assert model.batch(prompts[:5]) == wanted[:5]


def test_asynchronous(model: OpenAI) -> None:
    async def read() -> tuple[str, str]:
        return "".join([piece async for piece in model.astream("import ")]), await model.ainvoke("import ")

    text = model.invoke("import ")
    assert asyncio.run(read()) == (text, text)


def test_several_samples(v1: str) -> None:
    model = OpenAI(model=MODEL, base_url=v1, api_key=KEY, max_tokens=8, n=3, best_of=3, seed=1, max_retries=0)  # type: ignore[arg-type, call-arg]
    (generations,) = model.generate(["def "]).generations
    assert len(generations) == 3 and len({generation.text for generation in generations}) > 1


def test_chat(chat: str) -> None:
    model = ChatOpenAI(model=MODEL, base_url=chat, api_key=KEY, max_tokens=12, temperature=0, max_retries=0)  # type: ignore[arg-type, call-arg]
    answer = model.invoke([HumanMessage("print(")])
    assert "".join(str(chunk.content) for chunk in model.stream([HumanMessage("print(")])) == answer.content
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] > 0
