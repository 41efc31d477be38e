"""Synthetic tasks ask what their context answers, and scoring counts right answers."""

from __future__ import annotations

import pytest
import torch

from lrt_core.generate import read
from tests.helpers import TINY_VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer
from training.probes import Task, copying, induction, ordinary_ids, recall, score


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_ordinary_ids_hold_no_special_token() -> None:
    tokenizer = tiny_tokenizer()
    ids = ordinary_ids(tokenizer).tolist()
    assert len(ids) == TINY_VOCAB_SIZE - len(tokenizer.special_tokens)
    assert not set(ids) & set(tokenizer.special_tokens.values())


def test_copying_asks_the_repetition() -> None:
    tokens, targets = copying(torch.arange(100, 200), 5, 12, generator())
    assert torch.equal(tokens[:, :6], tokens[:, 6:])
    assert (targets[:, :6] == -1).all() and (targets[:, -1] == -1).all()
    assert torch.equal(targets[:, 6:11], tokens[:, 1:6])


def test_induction_asks_what_followed_the_one_earlier_occurrence() -> None:
    tokens, targets = induction(torch.arange(100, 130), 50, 10, generator())
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        places = [index for index, id in enumerate(row) if id == row[-1]]
        assert len(places) == 2
        assert asked == [-1] * 9 + [row[places[0] + 1]]


def test_recall_asks_the_value_of_a_key() -> None:
    tokens, targets = recall(torch.arange(100, 140), 50, 11, generator())
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        keys, values = row[0:-1:2], row[1:-1:2]
        assert len(set(keys)) == 5
        assert asked[:-1] == [-1] * 10
        assert asked[-1] == values[keys.index(row[-1])]


@pytest.mark.parametrize("bos_id", [None, 3])
def test_score_counts_what_the_model_would_say(bos_id: int | None) -> None:
    """Asked for its own likeliest token at one position and its least likely at another, half is right."""
    model = tiny_model(tiny_config(recurrence=None))
    tokens = torch.tensor([[5, 6, 7, 8]])
    targets = torch.full_like(tokens, -1)
    prompt = tokens if bos_id is None else torch.tensor([[bos_id, 5, 6, 7, 8]])
    logits = read(model, prompt[0].tolist()).logits[-4:]
    targets[0, 1], targets[0, 3] = logits[1].argmax(), logits[3].argmin()
    result = score(model, Task(tokens, targets), bos_id, 1e-6)
    assert (result.accuracy, result.num_answers) == (0.5, 2)
    log_probs = logits.log_softmax(dim=-1)
    expected = -(log_probs[1].max() + log_probs[3].min()) / 2
    assert result.loss == pytest.approx(float(expected), rel=1e-4)
