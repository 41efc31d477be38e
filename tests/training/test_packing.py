"""Rows from documents: nothing lost, nothing twice, lanes apart, and a position that resumes."""

from __future__ import annotations

import json
import re
from collections import Counter
from random import Random

import pytest
import torch

from tests.helpers import tiny_tokenizer
from training.data import Document
from training.packing import Packer, Position, encode_with_cuts, evaluation_rows
from training.tokenizer import train_tokenizer

TOKENIZER = tiny_tokenizer()
BOS = TOKENIZER.special_tokens["<|bos|>"]


def make_documents(lengths: list[int]) -> list[Document]:
    """Documents of single-byte tokens, each of one byte value alone."""
    return [Document(str(index), chr(ord("!") + index) * length) for index, length in enumerate(lengths)]


def make_packer(lengths: list[int], batch_size: int = 2, sequence_len: int = 4, seed: int = 0) -> Packer:
    return Packer(make_documents(lengths), TOKENIZER, sequence_len, batch_size, seed)


def test_targets_follow_tokens_and_rows_open_with_bos() -> None:
    packer = make_packer([3, 9, 5])
    for _ in range(10):
        tokens, targets = packer.batch()
        assert tokens.shape == targets.shape == (2, 4)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        assert tokens[:, 0].tolist() == [BOS, BOS]
        assert not ((tokens[:, :-1] == BOS) & (tokens[:, 1:] == BOS)).any()


def test_every_token_is_a_target_once_an_epoch() -> None:
    """One lane, so that the epoch's end is a definite place."""
    lengths = [3, 9, 5, 7, 1, 12]
    packer = make_packer(lengths, batch_size=1)
    counts: Counter[int] = Counter()
    while packer.position.epoch < 3:
        counts.update(packer.batch()[1].flatten().tolist())
    for index, length in enumerate(lengths):
        epochs = counts[TOKENIZER.encode(chr(ord("!") + index), add_bos=False)[0]] / length
        assert 2 <= epochs <= 4, index


def test_rows_of_a_batch_come_from_different_documents() -> None:
    tokens, _ = make_packer([100] * 4, batch_size=4).batch()
    assert len({row[1] for row in tokens.tolist()}) == 4


def test_order_depends_on_the_seed_and_the_epoch() -> None:
    def order(seed: int) -> list[int]:
        packer = make_packer([4] * 8, batch_size=1, seed=seed)
        return [int(packer.batch()[1][0, 0]) for _ in range(16)]

    assert order(0) == order(0) != order(1)
    assert set(order(0)[:8]) == set(order(0)[8:])
    assert order(0)[:8] != order(0)[8:]


def make_prose_packer() -> Packer:
    documents = [Document(str(index), f"the number {index} and more words than that " * (index + 1)) for index in range(5)]
    return Packer(documents, TOKENIZER, sequence_len=16, batch_size=3, seed=0)


@pytest.mark.parametrize("steps", [0, 1, 5, 17])
def test_position_resumes_exactly(steps: int) -> None:
    """In the middle of documents dealt before cuts began, too."""
    packer, resumed = make_prose_packer(), make_prose_packer()
    for step in range(steps):
        packer.cut_share = 0.5 if step >= 3 else 0.0
        packer.batch()
    resumed.cut_share = packer.cut_share = 0.5
    resumed.position = Position.from_dict(json.loads(json.dumps(packer.position.to_dict())))
    for _ in range(12):
        for one, other in zip(packer.batch(), resumed.batch(), strict=True):
            assert torch.equal(one, other)


def test_more_lanes_than_documents() -> None:
    tokens, _ = make_packer([2], batch_size=3, sequence_len=6).batch()
    assert tokens.shape == (3, 6)


def test_cuts_separate_words_from_their_spaces_and_line_breaks() -> None:
    text = "def f(self, value):\n    return  self.value "
    tokenizer = train_tokenizer([text * 50], 330, 10_000_000)

    def joined(share: float) -> tuple[bool, bool]:
        """Whether a token holds a space and the word after it, and whether one holds punctuation and a line break."""
        ids = encode_with_cuts(tokenizer, text, share, Random(0))
        assert ids[0] == tokenizer.bos_id not in ids[1:]
        assert tokenizer.decode(ids[1:]) == text
        tokens = [tokenizer.token_bytes(id) for id in ids]
        return any(token.startswith(b" ") and token.strip() for token in tokens), b"):\n" in tokens

    assert encode_with_cuts(tokenizer, text, 0.0, Random(0)) == tokenizer.encode(text, add_bos=True)
    assert joined(0.0) == (True, True)
    assert joined(1.0) == (False, False)


def test_the_share_and_the_seed_decide_the_cuts() -> None:
    text = "the dot in 12 ranks:\n    return  self.port " * 20
    whole, *some = (encode_with_cuts(TOKENIZER, text, 0.5 * bool(seed), Random(seed)) for seed in (0, 1, 1, 2))
    assert some[0] == some[1] != some[2]
    assert len(whole) < len(some[0]) < len(encode_with_cuts(TOKENIZER, text, 1.0, Random(1)))


def test_no_documents() -> None:
    with pytest.raises(ValueError, match="no document"):
        Packer([], TOKENIZER, 4, 2, 0)


def test_evaluation_rows_spread_over_documents_and_places() -> None:
    documents = [Document(str(index), "abcdefghijkl"[index:] * 40) for index in range(3)]
    rows = evaluation_rows(documents, TOKENIZER, 8, 5)
    assert rows.shape == (5, 9)
    assert rows[:, 0].tolist() == [BOS] * 5
    streams = [TOKENIZER.encode(document.text, add_bos=False) for document in documents]
    for visit in range(5):
        index, place = visit % 3, visit % 3 + visit // 3
        assert rows[visit, 1:].tolist() == streams[index][8 * place : 8 * place + 8]


def test_evaluation_rows_take_what_there_is() -> None:
    documents = make_documents([3, 9])
    assert evaluation_rows(documents, TOKENIZER, 4, 64).shape == (2, 5)
    with pytest.raises(ValueError, match="the validation documents do not fill a row of 14 tokens"):
        evaluation_rows(documents, TOKENIZER, 14, 64)


def test_evaluation_rows_are_filled_with_short_documents() -> None:
    """Every twentieth is long; their rows come first, as they always were, and then short ones, none of them twice."""
    documents = [
        Document(str(index), f"document {index:03} " * (3 if index % 20 else 20) + "and its end") for index in range(400)
    ]
    before = evaluation_rows(documents, TOKENIZER, 64, 64, fill=False)
    rows = evaluation_rows(documents, TOKENIZER, 64, 64)
    assert 0 < len(before) < 32
    assert len(rows) == 64
    assert torch.equal(rows[: len(before)], before)
    texts = [TOKENIZER.decode(row) for row in rows.tolist()]
    assert all(text.count("<|bos|>") > 1 for text in texts[len(before) :])
    named = [set(re.findall(r"document (\d{3})", text)) for text in texts]
    short = set().union(*named[len(before) :])
    assert len(short) > 32 and all(int(name) % 20 for name in short)
    assert len({text[7:] for text in texts}) == 64
    filled, unfilled = (evaluation_rows(documents[::20], TOKENIZER, 64, 32, fill) for fill in (True, False))
    assert len(filled) == 32 and torch.equal(filled, unfilled), "where long documents suffice nothing changes"


def test_evaluation_rows_of_documents_shorter_than_a_row() -> None:
    """They follow each other with bos between, as training reads them."""
    (row,) = evaluation_rows(make_documents([3, 9]), TOKENIZER, 13, 64).tolist()
    assert row == [BOS, *b"!!!", BOS, *b'"' * 9]
    assert evaluation_rows(make_documents([3] * 60), TOKENIZER, 20, 4).shape == (4, 21)
