"""Generated ids to text, piece by piece: never half a character, never a part of a stop string.

Neighbours: `async_engine.py` keeps one per sample, off the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from lrt_core.text import TextDecoder
from lrt_core.tokenizer import Tokenizer


class Detokenizer:
    """Incremental UTF-8 decoding with stop strings that match across token borders. Special tokens have no text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop = TextDecoder(tokenizer), tuple(stop)
        self._held = ""

    def add(self, token_id: int) -> tuple[str, str | None]:
        """Take in one token; returns the text that is now certain and the stop string that ended the sample, if one did."""
        return self._emit(self._decoder.add(token_id))

    def finish(self) -> tuple[str, str | None]:
        """The rest at the sample's end; an incomplete character becomes U+FFFD, held text that was no stop string comes out."""
        text, stop = self._emit(self._decoder.finish())
        held, self._held = self._held, ""
        return text + held, stop

    def _emit(self, piece: str) -> tuple[str, str | None]:
        if not self._stop:
            return piece, None
        text = self._held + piece
        found = [(text.index(stop), stop) for stop in self._stop if stop in text]
        if found:
            position, stop = min(found, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return text[:position], stop
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
