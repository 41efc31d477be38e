"""A real engine over a tiny model behind the real application, asked in-process: what a field does is seen in the output."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from typing import Any

import httpx

from lrt_core.chat import ChatTemplate
from lrt_core.model import LatentRecurrentTransformer
from server.api.app import create_app
from server.api.service import Service
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from tests.engines import make_engine
from tests.helpers import tiny_model, tiny_tokenizer
from tests.server.fakes import events

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.special_tokens["<|assistant_end|>"]
PROMPT = [116, 104, 101, 32, 101, 110, 100, 58]


class Live:
    """Answers /v1/completions; every call starts an engine's thread over the same engine and ends it."""

    path = "/v1/completions"

    def __init__(
        self,
        model: LatentRecurrentTransformer | None = None,
        eos_ids: Collection[int] = TOKENIZER.eos_ids,
        max_logprobs: int = 20,
        stream_interval: int = 1,
        **config: Any,
    ) -> None:
        self.model = model or tiny_model()
        self.engine: Engine = make_engine(self.model, eos_ids, **config)
        self.options: dict[str, Any] = {"max_logprobs": max_logprobs, "stream_interval": stream_interval}

    def post(self, *bodies: dict[str, Any], headers: dict[str, str] | None = None) -> list[httpx.Response]:
        """The responses to several bodies, sent at once."""
        return asyncio.run(self._post(bodies, headers or {}))

    async def _post(self, bodies: Collection[dict[str, Any]], headers: dict[str, str]) -> list[httpx.Response]:
        engine = AsyncEngine(self.engine, TOKENIZER)
        await engine.start()
        assert TOKENIZER.chat_template is not None
        template = ChatTemplate(TOKENIZER.chat_template, TOKENIZER)
        service = Service(engine, ("tiny",), "fingerprint", 0, lambda: b"", 2**20, chat=template, **self.options)
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            calls = [client.post(self.path, content=json.dumps(body), headers=headers) for body in bodies]
            responses = await asyncio.gather(*calls)
        await engine.stop()
        assert self.engine.blocks.num_free_blocks == self.engine.config.num_blocks
        return list(responses)

    def ask(self, **fields: Any) -> httpx.Response:
        """One response: greedy, twelve tokens behind PROMPT with their ids, unless told otherwise."""
        return self.post(self.defaults(fields))[0]

    def body(self, **fields: Any) -> dict[str, Any]:
        """The answer of a request that succeeds; a stream's chunks as the plain response that they make."""
        response = self.ask(**fields)
        assert response.status_code == 200, response.text
        return self.joined(events(response)) if fields.get("stream") else dict(response.json())

    def defaults(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A body that says only what matters."""
        return defaults(fields)

    def joined(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """The plain response that a stream's chunks make."""
        return joined(chunks)

    def choice(self, **fields: Any) -> dict[str, Any]:
        """The only choice."""
        (choice,) = self.body(**fields)["choices"]
        return dict(choice)

    def ids(self, **fields: Any) -> list[int]:
        """The generated ids of the only choice."""
        return list(self.choice(**fields)["token_ids"])


class LiveChat(Live):
    """The same for /v1/chat/completions; the prompt is made of one message unless told otherwise."""

    path = "/v1/chat/completions"

    def defaults(self, fields: dict[str, Any]) -> dict[str, Any]:
        """See the base class."""
        body = {**defaults({}), "messages": [{"role": "user", "content": "the end:"}], **fields}
        return {key: value for key, value in body.items() if key != "prompt"}

    def joined(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """See the base class; every choice begins with its role alone."""
        choices: dict[int, dict[str, Any]] = {}
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            delta = choice.pop("delta")
            whole = choices.get(choice["index"])
            if whole is None:
                assert delta == {"role": "assistant", "content": ""}
                choices[choice["index"]] = {**choice, "message": {**delta, "refusal": None}, "token_ids": []}
                continue
            assert whole["finish_reason"] is None and delta.keys() <= {"content"}, "a chunk after the last, or another role"
            whole["message"]["content"] += delta.get("content", "")
            whole["token_ids"] += choice.pop("token_ids", [])
            entries = choice.pop("logprobs")
            if entries is not None:
                known = whole["logprobs"] or {"content": [], "refusal": None}
                whole["logprobs"] = {**known, "content": known["content"] + entries["content"]}
            whole.update(choice)
        return {**chunks[0], "choices": [choices[index] for index in sorted(choices)], "usage": chunks[-1].get("usage")}


def defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """A body that says only what matters."""
    return {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True, **fields}


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The plain response that a stream's chunks make."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole = choices.setdefault(choice["index"], choice)
            if whole is not choice:
                assert whole["finish_reason"] is None, "a chunk after the last"
                _append(whole, choice)
    return {**chunks[0], "choices": [choices[index] for index in sorted(choices)], "usage": chunks[-1].get("usage")}


def _append(whole: dict[str, Any], choice: dict[str, Any]) -> None:
    for key, value in choice.items():
        if key in ("text", "token_ids"):
            whole[key] += value
        elif key == "logprobs" and value is not None:
            for column in value:
                whole[key][column] += value[column]
        elif key != "index":
            whole[key] = value
