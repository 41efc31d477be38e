"""Synthetic tasks that can be solved from the context alone: copying, induction, recall.

Their sequences are random ordinary tokens, so nothing that a model knows of language helps. Every task says which positions are
asked; a model is read with its true recurrence and answers with its likeliest token. Neighbour: `evaluation.py`.

Shapes: R sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrt_core.model import LatentRecurrentTransformer
from lrt_core.refine import refine
from lrt_core.tokenizer import Tokenizer
from training.measures import ROUNDING


class Task(NamedTuple):
    """tokens [R, T] and, for each, what is asked: targets [R, T], -1 where nothing is."""

    tokens: Tensor
    targets: Tensor


class Score(NamedTuple):
    """Share of right answers, mean loss of the right answer in nats, and how many answers were asked."""

    accuracy: float
    loss: float
    num_answers: int


def ordinary_ids(tokenizer: Tokenizer) -> Tensor:
    """Every id that is not a special token."""
    special = set(tokenizer.special_tokens.values())
    return torch.tensor([id for id in range(tokenizer.vocab_size) if id not in special])


def copying(ids: Tensor, num_rows: int, length: int, generator: torch.Generator) -> Task:
    """A random half, then the same again: every token of the repetition but its first is asked."""
    half = length // 2
    first = ids[torch.randint(len(ids), (num_rows, half), generator=generator)]
    tokens = torch.cat([first, first], dim=1)
    targets = torch.full_like(tokens, -1)
    targets[:, half:-1] = tokens[:, half + 1 :]
    return Task(tokens, targets)


def induction(ids: Tensor, num_rows: int, length: int, generator: torch.Generator) -> Task:
    """One pair a b somewhere among random tokens other than a; the last token is a again, b is asked."""
    orders = torch.stack([torch.randperm(len(ids), generator=generator) for _ in range(num_rows)])
    a = ids[orders[:, 0]]
    others = orders[:, 1:].gather(1, torch.randint(len(ids) - 1, (num_rows, length), generator=generator))
    tokens = ids[others]
    places = torch.randint(length - 2, (num_rows,), generator=generator)
    rows = torch.arange(num_rows)
    tokens[rows, places] = a
    tokens[:, -1] = a
    targets = torch.full_like(tokens, -1)
    targets[:, -1] = tokens[rows, places + 1]
    return Task(tokens, targets)


def recall(ids: Tensor, num_rows: int, length: int, generator: torch.Generator) -> Task:
    """Pairs of different keys and any values, then one of the keys again: its value is asked."""
    num_pairs = min((length - 1) // 2, len(ids))
    keys = torch.stack([ids[torch.randperm(len(ids), generator=generator)[:num_pairs]] for _ in range(num_rows)])
    values = ids[torch.randint(len(ids), (num_rows, num_pairs), generator=generator)]
    asked = torch.randint(num_pairs, (num_rows, 1), generator=generator)
    tokens = torch.cat([torch.stack([keys, values], dim=2).flatten(1), keys.gather(1, asked)], dim=1)
    targets = torch.full_like(tokens, -1)
    targets[:, -1:] = values.gather(1, asked)
    return Task(tokens, targets)


TASKS: dict[str, Callable[[Tensor, int, int, torch.Generator], Task]] = {
    "copying": copying,
    "induction": induction,
    "recall": recall,
}


@torch.no_grad()
def score(model: LatentRecurrentTransformer, task: Task, bos_id: int | None, tolerance: float) -> Score:
    """Answers after `bos_id`, if any, and the task's tokens, by as many parallel passes as the tolerance takes."""
    tokens, targets = task
    if bos_id is not None:
        tokens = torch.cat([torch.full_like(tokens[:, :1], bos_id), tokens], dim=1)
        targets = torch.cat([torch.full_like(targets[:, :1], -1), targets], dim=1)
    hidden = refine(model, tokens.to(model.device), tolerance, rounding=ROUNDING).hidden
    asked = targets >= 0
    answers = targets[asked].to(model.device)
    log_probs = model.logits(hidden[asked.to(model.device)]).log_softmax(dim=-1)
    right = (log_probs.argmax(dim=-1) == answers).double().mean()
    return Score(float(right), -float(log_probs.gather(1, answers[:, None]).double().mean()), len(answers))
