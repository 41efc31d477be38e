"""Train the tokenizer of a new model: byte-pair merges by rustbpe, the special tokens of chat-trained models.

Neighbours: `data.py` supplies the texts, `lrt_core/tokenizer.py` is the result and encodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import rustbpe

from lrt_core.official_tokenizer import ASSISTANT_END, BOS, CHAT_TEMPLATE
from lrt_core.tokenizer import Tokenizer

SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
"""GPT-4's split with numbers in groups of at most two digits, which a small vocabulary can hold whole."""

SPECIAL_TOKENS = (
    BOS,
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    ASSISTANT_END,
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
EOS_TOKENS = (ASSISTANT_END, BOS)

_NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_bytes: int) -> Tokenizer:
    """Learn merges from the first `max_bytes` UTF-8 bytes of `texts`.

    vocab_size counts the special tokens, which take the last ids; a corpus with too few merges gives fewer. ValueError when
    not even the 256 single bytes fit.
    """
    num_mergeable = vocab_size - len(SPECIAL_TOKENS)
    if num_mergeable < _NUM_BYTES:
        raise ValueError(f"vocab_size must be at least {_NUM_BYTES + len(SPECIAL_TOKENS)}, got {vocab_size}")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(_limited(texts, max_bytes), num_mergeable, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    special_tokens = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
    return Tokenizer(SPLIT_PATTERN, ranks, special_tokens, BOS, EOS_TOKENS, add_bos=True, chat_template=CHAT_TEMPLATE)


def _limited(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    for text in texts:
        if max_bytes <= 0:
            return
        yield text
        max_bytes -= len(text.encode("utf-8"))
