"""POST /tokenize and /detokenize, GET /tokenizer_info: what clients need that count tokens or send ids.

Neighbours: `chat.py` renders messages, `prompts.py` does the same to the prompts of completions.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import PlainValidator

from lrt_core.tokenizer import TokenizerError
from server.api.chat import render
from server.api.chat_schemas import Messages, RenderingFields
from server.api.completions import read_fields
from server.api.errors import bad_request, json_response
from server.api.prompts import adds_bos
from server.api.schemas import RequestFields
from server.api.service import Service
from server.api.threads import MANY_CHARACTERS, MANY_ITEMS, run_beside
from server.api.values import Id, Text, parse_tokens

_OF_PROMPTS = ("add_special_tokens", "allow_special")
_OF_MESSAGES = ("add_generation_prompt", "continue_final_message")


class TokenizeRequest(RenderingFields):
    """A valid body of POST /tokenize: a prompt or messages.

    add_special_tokens: put the document's start before a prompt, None as the checkpoint says. allow_special:
    names of special tokens in the prompt are those tokens; when it is left out, only in a prompt that is nothing but one name.
    """

    not_built = RenderingFields.not_built - set(_OF_PROMPTS)
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    allow_special: bool | None = None
    return_token_strs: bool = False

    def conflicts(self) -> list[tuple[str, str]]:
        """See the base class."""
        problems = super().conflicts()
        if (self.prompt is None) == (self.messages is None):
            problems.append(("prompt", "or messages must be given, and not both"))
        kind, foreign = ("messages", _OF_PROMPTS) if self.messages is not None else ("a prompt", _OF_MESSAGES)
        given = (name for name in foreign if name in self.model_fields_set and getattr(self, name))
        return [*problems, *((name, f"has no meaning for {kind}") for name in given)]


class DetokenizeRequest(RequestFields):
    """A valid body of POST /detokenize."""

    tokens: Annotated[tuple[int, ...], PlainValidator(parse_tokens, list[Id])]


def add_tokenization(app: FastAPI, service: Service) -> None:
    """Add the routes to `app`."""
    tokenizer = service.engine.tokenizer

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """Ids of a prompt or a conversation."""
        fields, headers = await read_fields(request, TokenizeRequest, service)
        if fields.messages is not None:
            ids = await render(service, fields.messages, fields)
        else:
            ids = await run_beside(len(fields.prompt or "") > MANY_CHARACTERS, partial(_encode, service, fields))

        def respond() -> Response:
            body = {
                "count": len(ids),
                "max_model_len": service.engine.config.max_model_len,
                "tokens": ids,
                "token_strs": [tokenizer.decode([id]) for id in ids] if fields.return_token_strs else None,
            }
            return json_response(body, headers=headers)

        return await run_beside(len(ids) > MANY_ITEMS, respond)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """Text of ids."""
        fields, headers = await read_fields(request, DetokenizeRequest, service)

        def respond() -> Response:
            try:
                return json_response({"prompt": tokenizer.decode(fields.tokens)}, headers=headers)
            except TokenizerError as error:
                raise bad_request(f"'tokens' cannot be decoded: {error}", param="tokens") from None

        return await run_beside(len(fields.tokens) > MANY_ITEMS, respond)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What the tokenizer is."""
        return json_response(_describe(service))


def _encode(service: Service, fields: TokenizeRequest) -> list[int]:
    tokenizer, prompt = service.engine.tokenizer, fields.prompt or ""
    is_name = prompt in tokenizer.special_tokens
    allow_special = is_name if fields.allow_special is None else fields.allow_special
    add_bos = adds_bos(tokenizer, fields.add_special_tokens)
    try:
        return tokenizer.encode(prompt, add_bos=add_bos, allow_special=allow_special)
    except TokenizerError as error:
        raise bad_request(f"'prompt' cannot be tokenised: {error}", param="prompt") from None


def _describe(service: Service) -> dict[str, Any]:
    tokenizer = service.engine.tokenizer
    return {
        "tokenizer_class": "tiktoken",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": service.engine.config.max_model_len,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_tokens[0] if tokenizer.eos_tokens else None,
        "pad_token": None,
        "unk_token": None,
        "add_bos_token": tokenizer.add_bos,
        "additional_special_tokens": list(tokenizer.special_tokens),
        "chat_template": service.chat.source if service.chat is not None else None,
    }
