"""POST /v1/chat/completions: from messages to a prompt by the chat template; the rest is as with any completion.

Neighbours: `chat_schemas.py` checks the fields, `lrt_core/chat.py` renders, `completions.py` runs the call, `chat_choices.py`
writes the choices. `tokenization.py` renders here too.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request, Response

from lrt_core.chat import ChatError
from lrt_core.tokenizer import TokenizerError
from server.api.chat_choices import ChatWriter
from server.api.chat_schemas import ChatRequest, Message, RenderingFields, for_template
from server.api.completions import Generation, answer, read_fields, response_id
from server.api.errors import bad_request
from server.api.prompts import Prompt, PromptReader
from server.api.service import Service
from server.api.threads import MANY_CHARACTERS, run_beside

MANY_MESSAGES = 100
"""More than that are worth a thread."""


class ChatCompletion(Generation[ChatRequest]):
    """A call of this route."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _writer(self, index: int, prompt: Prompt) -> ChatWriter:
        fields = self.fields
        return ChatWriter(
            self._engine.tokenizer,
            index,
            prompt.ids,
            logprobs=fields.logprobs,
            prompt_logprobs=fields.prompt_logprobs,
            return_token_ids=fields.return_token_ids,
            hidden_size=self._hidden_size,
        )

    @property
    def _num_logprobs(self) -> int | None:
        return (self.fields.top_logprobs or 0) if self.fields.logprobs else None


async def render(service: Service, messages: Sequence[Message], fields: RenderingFields) -> list[int]:
    """Ids of a conversation, long ones rendered in a thread. Raises ApiError (400)."""
    template = service.chat
    if template is None:
        raise bad_request(
            "This model has no chat template: use /v1/completions, or start the server with --chat-template FILE.",
            param="messages",
            code="no_chat_template",
        )
    given = for_template(messages)

    def work() -> list[int]:
        try:
            return template.render(
                given,
                add_generation_prompt=fields.opens_turn,
                continue_final_message=fields.continue_final_message,
            ).ids
        except (ChatError, TokenizerError) as error:
            raise bad_request(f"'messages' cannot be rendered: {error}", param="messages") from None

    is_long = len(messages) > MANY_MESSAGES or sum(len(message.content) for message in messages) > MANY_CHARACTERS
    return await run_beside(is_long, work)


def add_chat(app: FastAPI, service: Service) -> None:
    """Add the route to `app`."""
    reader = PromptReader.of(service.engine.tokenizer, service.engine.config.max_model_len, param="messages")

    @app.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        fields, headers = await read_fields(request, ChatRequest, service)
        reader.check_size(sum(len(message.content.encode("utf-8")) for message in fields.messages))
        ids = await render(service, fields.messages, fields)
        if not ids:
            raise bad_request("'messages' render to nothing", param="messages")
        reader.check_length(len(ids), fields.max_tokens)
        id = response_id(ChatCompletion.id_prefix, fields, request.headers)
        return await answer(service, request, ChatCompletion(service, fields, [Prompt(tuple(ids))], id), headers)
