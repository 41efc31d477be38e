"""Server-sent events, and the chunks of a stream among them, of which all but a few bytes are the same from token to token.

Neighbours: `completions.py` sends them; `choices.py` makes the choices; a test holds every chunk against its plain encoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any

from server.api.choices import Chunk
from server.api.errors import dump_json, escape_line_ends

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_PLAIN = {"logprobs": None, "finish_reason": None, "stop_reason": None}
"""What follows the text in the choice of an ordinary token."""
_PLAIN_DELTA = {"content"}
"""What an ordinary token is in a chat."""
_PLAIN_END = dump_json(_PLAIN).replace(b"{", b",", 1)


def event(content: Any) -> bytes:
    """One event that carries JSON."""
    return b"data: " + dump_json(content) + b"\n\n"


def whole(head: Mapping[str, Any], choices: Sequence[Chunk], tail: Mapping[str, Any]) -> bytes:
    """JSON of the dict of `head`, the choices and `tail`, one choice after the other: each is an encoder's call, during which
    no other thread gets on."""
    return dump_json(head)[:-1] + b',"choices":[' + b",".join(map(dump_json, choices)) + b"]," + dump_json(tail)[1:]


def _string(text: str) -> bytes:
    return escape_line_ends(encode_basestring(text)).encode("utf-8", "replace")


class ChunkWriter:
    """Writes the events of one stream: `head`, then the choice, then `tail`, as `event` would write the dict of them all."""

    def __init__(self, head: Mapping[str, Any], tail: Mapping[str, Any]) -> None:
        self._start = b"data: " + dump_json(head)[:-1] + b',"choices":['
        self._end = b"]" + (b"," + dump_json(tail)[1:] if tail else b"}") + b"\n\n"
        self._plain_end = _PLAIN_END + self._end

    def write(self, choice: Chunk) -> bytes:
        """The event of a chunk with one choice."""
        if len(choice) == 2 + len(_PLAIN) and choice["finish_reason"] is None and choice["logprobs"] is None:
            delta = choice.get("delta")
            if delta is None:
                text = _string(choice["text"])
                return b'%b{"index":%d,"text":%b%b' % (self._start, choice["index"], text, self._plain_end)
            if delta.keys() == _PLAIN_DELTA:
                text = _string(delta["content"])
                return b'%b{"index":%d,"delta":{"content":%b}%b' % (self._start, choice["index"], text, self._plain_end)
        return self._start + dump_json(choice) + self._end
