"""Generated ids to text, piece by piece: never half a character, never a part of a stop string.

Neighbours: `async_engine.py` keeps one per sample, off the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from lrt_core.text import TextDecoder
from lrt_core.tokenizer import Tokenizer


class Detokenizer:
    """Incremental UTF-8 decoding with stop strings that match across token borders. Special tokens have no text.

    A stop string counts if it ends in the text of token min_tokens or a later one. It is cut off, unless include_stop.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0, include_stop: bool = False) -> None:
        self._decoder = TextDecoder(tokenizer)
        self._stops = _compile(tuple(stop))
        self._min_tokens, self._include_stop = min_tokens, include_stop
        self._num_tokens = 0
        self._held = ""
        self._partial: dict[int, int] = {}
        """By stop string, how many of its characters the text ends with; those of none are left out."""

    def add(self, token_id: int) -> tuple[str, str | None]:
        """Take in one token; returns the text that is now certain and the stop string that ended the sample, if one did."""
        self._num_tokens += 1
        return self._emit(self._decoder.add(token_id))

    def finish(self) -> tuple[str, str | None]:
        """The rest at the sample's end; an incomplete character becomes U+FFFD, held text that was no stop string comes out."""
        text, stop = self._emit(self._decoder.finish())
        held, self._held = self._held, ""
        return text + held, stop

    def _emit(self, piece: str) -> tuple[str, str | None]:
        if not self._stops.texts:
            return piece, None
        text = self._held + piece
        found = self._match(piece, len(self._held))
        if found and self._num_tokens >= self._min_tokens:
            position, stop = min(found, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return text[: position + len(stop) * self._include_stop], stop
        keep = max(self._partial.values(), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _match(self, piece: str, offset: int) -> list[tuple[int, str]]:
        """Follow every stop string through `piece`, which stands at `offset` of the text; where those begin that end in it."""
        found = []
        for end, character in enumerate(piece, offset + 1):
            reached = {}
            for index in {*self._partial, *self._stops.starting(character)}:
                length = self._stops.step(index, self._partial.get(index, 0), character)
                if length == len(self._stops.texts[index]):
                    found.append((end - length, self._stops.texts[index]))
                    length = self._stops.borders[index][length]
                if length:
                    reached[index] = length
            self._partial = reached
        return found


class _StopStrings:
    """Stop strings with what it takes to follow each through a text, a character at a time (Knuth, Morris and Pratt, 1977).

    borders[i][k]: length of the longest proper prefix of texts[i] with which its first k characters end.
    """

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.texts = texts
        self.borders: list[list[int]] = []
        self._starting: dict[str, list[int]] = {}
        for index, text in enumerate(texts):
            self._starting.setdefault(text[0], []).append(index)
            self.borders.append([0, 0])
            for position in range(1, len(text)):
                self.borders[index].append(self.step(index, self.borders[index][position], text[position]))

    def starting(self, character: str) -> Sequence[int]:
        """Those that begin with a character."""
        return self._starting.get(character, ())

    def step(self, index: int, length: int, character: str) -> int:
        """How much of a stop string the text ends with after `character`, `length` (less than all of it) before."""
        text, borders = self.texts[index], self.borders[index]
        while length and text[length] != character:
            length = borders[length]
        return length + 1 if text[length] == character else 0


@lru_cache(maxsize=64)
def _compile(texts: tuple[str, ...]) -> _StopStrings:
    """Once for all samples of a request."""
    return _StopStrings(texts)
