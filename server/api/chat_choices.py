"""From the engine's deltas to the choices of a chat: messages, a stream's deltas, logprobs in the chat shape.

Neighbours: `chat.py` drives it; `choices.py` does the same for completions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lrt_core.tokenizer import Tokenizer
from server.api.choices import LOWEST_LOGPROB, Chunk, write_error, write_latents, write_prompt_logprobs
from server.engine.request import Delta, TokenLogprob


class ChatWriter:
    """Writes one choice of a chat, whole or as chunks: the role first, then text, then the reason of the end."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: int,
        prompt_ids: tuple[int, ...],
        *,
        logprobs: bool = False,
        prompt_logprobs: int | None = None,
        return_token_ids: bool = False,
        hidden_size: int | None = None,
    ) -> None:
        self._tokenizer, self._index, self._prompt_ids = tokenizer, index, prompt_ids
        self._logprobs, self._return_token_ids = logprobs, return_token_ids
        self._prompt_logprobs, self._hidden_size = prompt_logprobs, hidden_size
        self._is_first = True

    def write(self, delta: Delta) -> Chunk:
        """The whole choice, of all its deltas joined."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        choice = self._choice("message", message, self._entries(delta.logprobs))
        choice.update(finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)
        if self._return_token_ids:
            choice.update(token_ids=list(delta.token_ids), prompt_token_ids=list(self._prompt_ids))
        return {**choice, **self._of_prompt(delta), **self._of_end(delta)}

    def opening(self, delta: Delta) -> list[Chunk]:
        """What a stream tells before the choice's first delta: who speaks, and what is said of the prompt."""
        if not self._is_first:
            return []
        self._is_first = False
        chunk = self._choice("delta", {"role": "assistant", "content": ""}, None)
        if self._return_token_ids:
            chunk["prompt_token_ids"] = list(self._prompt_ids)
        return [{**chunk, **self._of_prompt(delta)}]

    def chunks(self, delta: Delta) -> list[Chunk]:
        """What a stream tells of `delta`."""
        chunks = []
        has_tokens = bool(delta.token_ids) and (self._logprobs or self._return_token_ids)
        if delta.text or has_tokens:
            chunk = self._choice("delta", {"content": delta.text}, self._entries(delta.logprobs))
            if self._return_token_ids:
                chunk["token_ids"] = list(delta.token_ids)
            chunks.append(chunk)
        if delta.finish_reason is not None:
            chunk = self._choice("delta", {}, None)
            chunk.update(finish_reason=delta.finish_reason, stop_reason=delta.stop_reason, **self._of_end(delta))
            chunks.append(chunk)
        return chunks

    def _of_prompt(self, delta: Delta) -> dict[str, Any]:
        """What is said of the prompt, once; `delta` is the choice's first."""
        if self._prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": write_prompt_logprobs(self._tokenizer, delta, self._prompt_logprobs)}

    def _of_end(self, delta: Delta) -> dict[str, Any]:
        """What is said at the end; `delta` is the choice's last."""
        latents = {} if self._hidden_size is None else {"latents": write_latents(delta, self._hidden_size)}
        return {**latents, **write_error(delta)}

    def _choice(self, key: str, said: dict[str, Any], logprobs: dict[str, Any] | None) -> Chunk:
        return {"index": self._index, key: said, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}

    def _entries(self, logprobs: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [self._entry(item) for item in logprobs], "refusal": None}

    def _entry(self, item: TokenLogprob) -> dict[str, Any]:
        assert item.logprob is not None, "every generated token has one"
        top = [self._token(token_id, logprob) for token_id, logprob in item.top]
        return {**self._token(item.token_id, item.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        text = data.decode("utf-8", errors="replace")
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}
