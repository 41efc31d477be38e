"""Generated ids to text as they come: whole characters only. The server's `detokenizer.py` adds stop strings."""

from __future__ import annotations

import codecs

from lrt_core.tokenizer import Tokenizer


class TextDecoder:
    """Incremental UTF-8 decoding of token ids; special tokens have no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_tokens.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The characters that this token completes; possibly none."""
        return "" if token_id in self._special else self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What an incomplete character at the end becomes: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)
