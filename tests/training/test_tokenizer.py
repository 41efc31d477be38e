"""Training a tokenizer: sizes, special tokens, round trips, limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lrt_core.official_tokenizer import CHAT_TEMPLATE
from training.tokenizer import EOS_TOKENS, SPECIAL_TOKENS, train_tokenizer

TEXTS = ["def function(self, value):\n    return self.value + value\n" * 20, "numbers 12345 and naïve “quotes”\n" * 20]


def test_vocabulary_counts_special_tokens_which_come_last() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, 10_000_000)
    assert tokenizer.vocab_size == 300
    assert list(tokenizer.special_tokens.items()) == [
        (name, 300 - len(SPECIAL_TOKENS) + index) for index, name in enumerate(SPECIAL_TOKENS)
    ]
    assert tokenizer.bos_id == tokenizer.special_tokens["<|bos|>"]
    assert tokenizer.eos_ids == {tokenizer.special_tokens[name] for name in EOS_TOKENS}
    assert tokenizer.add_bos
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_merges_shorten_text_and_lose_nothing() -> None:
    tokenizer = train_tokenizer(TEXTS, 320, 10_000_000)
    for text in [*TEXTS, "unseen: \x00 \r\n\t 漢字 <|bos|>"]:
        ids = tokenizer.encode(text, add_bos=False)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(TEXTS[0], add_bos=False)) < len(TEXTS[0]) / 2


def test_numbers_are_split_in_twos() -> None:
    tokenizer = train_tokenizer(["1234 " * 500], 280, 10_000_000)
    longest = max((tokenizer.token_bytes(id) for id in tokenizer.encode("1234 1234", add_bos=False)), key=len)
    assert longest == b"12"


def test_a_small_corpus_gives_a_small_vocabulary() -> None:
    tokenizer = train_tokenizer(["abab"], 4096, 1000)
    assert tokenizer.vocab_size < 300


def test_only_the_first_bytes_are_read() -> None:
    def texts() -> Iterator[str]:
        yield "é" * 50
        yield "never reached, for the limit is 100 bytes"
        raise AssertionError("read past the limit")

    def first() -> Iterator[str]:
        yield "é" * 50

    assert train_tokenizer(texts(), 300, 100).ranks == train_tokenizer(first(), 300, 1000).ranks


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="at least 265, got 264"):
        train_tokenizer(TEXTS, 264, 1000)
