"""From the engine's deltas to the choices of a completion: texts, ids and logprobs in the legacy shape.

One `ChoiceWriter` per choice writes the chunks of a stream, or, from all its deltas joined, the choice of a plain response.
Neighbours: `completions.py` drives it, `server/engine/request.py` defines `Delta`.
"""

from __future__ import annotations

import base64
import codecs
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from lrt_core.tokenizer import Tokenizer
from server.api.errors import from_exception
from server.engine.request import Delta, TokenLogprob

Chunk = dict[str, Any]

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def _continues(pending: bytes, token: bytes) -> bool:
    """Whether a token's bytes go on with a character of which `pending` is the valid beginning."""
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(pending + token[:1])
    except UnicodeDecodeError:
        return False
    return True


class _Offsets:
    """Where in a text each of a run of tokens starts, in characters; a token that continues a character starts at it."""

    def __init__(self, start: int) -> None:
        self._position = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: bytes) -> int:
        """Offset of the next token, whose text is `token` (empty for one without text)."""
        pending = self._decoder.getstate()[0]
        if pending and not _continues(pending, token):  # what was left incomplete became a replacement character of its own
            self._position += len(self._decoder.decode(b"", final=True))
        position = self._position
        self._position += len(self._decoder.decode(token))
        return position


class _LogprobsWriter:
    """Builds the columns of a logprobs object, run by run."""

    def __init__(self, tokenizer: Tokenizer, num_alternatives: int) -> None:
        self._tokenizer, self._num_alternatives = tokenizer, num_alternatives
        self.columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, entries: Iterable[TokenLogprob], offsets: Sequence[int]) -> None:
        """Append one entry per token."""
        for entry, offset in zip(entries, offsets, strict=True):
            own = None if entry.logprob is None else max(entry.logprob, LOWEST_LOGPROB)
            self.columns["tokens"].append(self._text(entry.token_id))
            self.columns["token_logprobs"].append(own)
            self.columns["top_logprobs"].append(None if own is None else self._top(entry, own))
            self.columns["text_offset"].append(offset)

    def _top(self, entry: TokenLogprob, own: float) -> dict[str, float]:
        """The likeliest alternatives and the token itself; of ids with one text the larger logprob stays."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top[: self._num_alternatives], (entry.token_id, own)):
            text = self._text(token_id)
            top[text] = max(top.get(text, LOWEST_LOGPROB), logprob)
        return top

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])


class ChoiceWriter:
    """Writes the chunks of one choice from its sample's deltas.

    prompt_text: what echo puts before the completion, None without echo. prompt_ids: of the prompt, of which `hidden`
    leading ones (a token put before a text) have no part in prompt_text. logprobs, prompt_logprobs: alternatives to write
    beside each token's own, None for neither. hidden_size: numbers of a latent, None where none are asked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: int,
        prompt_ids: tuple[int, ...],
        *,
        prompt_text: str | None = None,
        hidden: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        return_token_ids: bool = False,
        hidden_size: int | None = None,
    ) -> None:
        self._tokenizer, self._index, self._prompt_ids = tokenizer, index, prompt_ids
        self._echo, self._hidden = prompt_text, hidden
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self._return_token_ids, self._hidden_size = return_token_ids, hidden_size
        self._special = frozenset(tokenizer.special_tokens.values())
        self._offsets = _Offsets(len(prompt_text or ""))
        self._is_first = True

    def write(self, delta: Delta) -> Chunk:
        """The chunk that says what `delta` says; the first also carries what is said of the prompt, the last the latents, or
        what went wrong."""
        is_first, self._is_first = self._is_first, False
        chunk: Chunk = {
            "index": self._index,
            "text": (self._echo or "") + delta.text if is_first else delta.text,
            "logprobs": self._write_logprobs(delta, is_first),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._return_token_ids:
            chunk["token_ids"] = list(delta.token_ids)
            if is_first:
                chunk["prompt_token_ids"] = list(self._prompt_ids)
        if self._prompt_logprobs is not None and is_first:
            chunk["prompt_logprobs"] = write_prompt_logprobs(self._tokenizer, delta, self._prompt_logprobs)
        if self._hidden_size is not None and delta.finish_reason is not None:
            chunk["latents"] = write_latents(delta, self._hidden_size)
        return {**chunk, **write_error(delta)}

    def opening(self, _delta: Delta) -> list[Chunk]:
        """What a stream tells before the choice's first delta: nothing."""
        return []

    def chunks(self, delta: Delta) -> list[Chunk]:
        """What a stream tells of `delta`."""
        return [self.write(delta)]

    def _write_logprobs(self, delta: Delta, is_first: bool) -> dict[str, list[Any]] | None:
        if self._logprobs is None:
            return None
        writer = _LogprobsWriter(self._tokenizer, self._logprobs)
        if is_first and self._echo is not None and not _is_unread(delta):
            assert delta.prompt_logprobs is not None, "echo with logprobs asks the engine for the prompt's"
            writer.add(delta.prompt_logprobs, self._prompt_offsets())
        assert len(delta.logprobs) == len(delta.token_ids), "one logprob per generated token"
        writer.add(delta.logprobs, [self._offsets.next(self._visible_bytes(id)) for id in delta.token_ids])
        return writer.columns

    def _prompt_offsets(self) -> list[int]:
        offsets = _Offsets(0)
        shown = self._prompt_ids[self._hidden :]
        return [0] * self._hidden + [offsets.next(self._tokenizer.token_bytes(id)) for id in shown]

    def _visible_bytes(self, token_id: int) -> bytes:
        """What a generated token adds to the text: special tokens add nothing."""
        return b"" if token_id in self._special else self._tokenizer.token_bytes(token_id)


def write_prompt_logprobs(tokenizer: Tokenizer, delta: Delta, num_alternatives: int) -> list[dict[str, Any] | None] | None:
    """For every prompt token, by token id, its own and the likeliest alternatives' logprob, rank and text; null for the first
    token, and for the whole of a prompt that was not read to its end. `delta` is a choice's first."""
    if _is_unread(delta):
        return None
    assert delta.prompt_logprobs is not None, "prompt logprobs were asked for"
    found: list[dict[str, Any] | None] = []
    for entry in delta.prompt_logprobs:
        if entry.logprob is None:
            found.append(None)
            continue
        ranked = [(entry.token_id, entry.logprob, entry.rank)]
        ranked += [(id, logprob, rank) for rank, (id, logprob) in enumerate(entry.top[:num_alternatives], 1)]
        entries: dict[str, dict[str, Any]] = {}
        for id, logprob, rank in ranked:
            text = tokenizer.decode([id])
            entries.setdefault(str(id), {"logprob": max(logprob, LOWEST_LOGPROB), "rank": rank, "decoded_token": text})
        found.append(entries)
    return found


def write_latents(delta: Delta, hidden_size: int) -> dict[str, Any] | None:
    """Latents as base64 of little-endian float32 numbers, row by row, and their shape; null for a sample that was aborted."""
    if delta.latents is None:
        return None
    data = delta.latents
    if sys.byteorder == "big":
        numbers = array("f", data)
        numbers.byteswap()
        data = numbers.tobytes()
    shape = [len(data) // (4 * hidden_size), hidden_size]
    return {"dtype": "float32", "shape": shape, "data": base64.b64encode(data).decode()}


def write_error(delta: Delta) -> dict[str, Any]:
    """What a choice says of a sample that could not go on while others of the call did; nothing of any other."""
    return {} if delta.error is None else from_exception(delta.error).body


def _is_unread(delta: Delta) -> bool:
    """Whether a choice's first delta is the end of one that was aborted before its prompt was read."""
    return delta.prompt_logprobs is None and delta.finish_reason == "abort"
