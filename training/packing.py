"""Documents packed into rows of a fixed length, in a seeded order, with a position that resumes exactly.

The documents of an epoch, in an order drawn from seed and epoch, form one stream of tokens with bos before each. A row is
bos and the next tokens of that stream: every row opens as a prompt does, and every token of the stream is a target once.
Neighbours: `data.py` supplies documents, `trainer.py` stores the position in its checkpoints.

Shapes: B batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lrt_core.tokenizer import Tokenizer
from training.data import Document


@dataclass
class Position:
    """The next token to be packed: the epoch, the document's rank in that epoch's order, the token's index in the document."""

    epoch: int = 0
    rank: int = 0
    offset: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the training state."""
        return asdict(self)


class Packer:
    """An endless source of batches from `documents`; `position` says where it stands and may be set to resume.

    Text is tokenised when it is reached, so that a run starts at once and holds no tokens.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        sequence_len: int,
        batch_size: int,
        seed: int,
        position: Position | None = None,
    ) -> None:
        if not documents:
            raise ValueError("there is no document to pack")
        assert tokenizer.bos_id is not None
        self.documents, self.tokenizer, self.bos_id = documents, tokenizer, tokenizer.bos_id
        self.sequence_len, self.batch_size, self.seed = sequence_len, batch_size, seed
        self.position = position or Position()
        self._order: list[int] = []
        self._order_epoch = -1
        self._document: tuple[int, list[int]] = (-1, [])

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next tokens and targets, integers [B, T] on the CPU; targets[:, t] follows tokens[:, t]."""
        rows = torch.tensor([self.row() for _ in range(self.batch_size)])
        return rows[:, :-1], rows[:, 1:]

    def row(self) -> list[int]:
        """The next T + 1 ids: bos and T of the stream, whose own bos is left out at the start."""
        row = [self.bos_id]
        while len(row) <= self.sequence_len:
            row += self._take(self.sequence_len + 1 - len(row), skip_bos=len(row) == 1)
        return row

    def _take(self, count: int, skip_bos: bool) -> list[int]:
        """Up to `count` next tokens of the current document; moves to the next document at its end."""
        tokens = self._current()
        start = self.position.offset + int(skip_bos and self.position.offset == 0)
        taken = tokens[start : start + count]
        self.position.offset = start + len(taken)
        if self.position.offset >= len(tokens):
            self._next_document()
        return taken

    def _next_document(self) -> None:
        position = self.position
        position.rank, position.offset = position.rank + 1, 0
        if position.rank == len(self.documents):
            position.epoch, position.rank = position.epoch + 1, 0

    def _current(self) -> list[int]:
        index = self._epoch_order()[self.position.rank]
        if self._document[0] != index:
            self._document = (index, self.tokenizer.encode(self.documents[index].text, add_bos=True))
        return self._document[1]

    def _epoch_order(self) -> list[int]:
        if self._order_epoch != self.position.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.position.epoch)
            self._order = torch.randperm(len(self.documents), generator=generator).tolist()
            self._order_epoch = self.position.epoch
        return self._order


def evaluation_rows(documents: Sequence[Document], tokenizer: Tokenizer, sequence_len: int, num_rows: int) -> Tensor:
    """At most num_rows rows [R, T + 1], spread over the documents and over the places within them.

    Each document in turn gives one row, the first document its first, the second its second, and so on around. ValueError
    when there is not one full row.
    """
    assert tokenizer.bos_id is not None
    cut = [
        _full_rows(tokenizer.encode(document.text, add_bos=False), tokenizer.bos_id, sequence_len)
        for document in _spread(documents, 2 * num_rows)
    ]
    rows = [
        rows[(index + visit) % len(rows)]
        for visit in range(max(map(len, cut), default=0))
        for index, rows in enumerate(cut)
        if visit < len(rows)
    ]
    if not rows:
        raise ValueError(f"no validation document has a full row of {sequence_len} tokens; give longer or more documents")
    return torch.tensor(rows[:num_rows])


def _full_rows(tokens: list[int], bos_id: int, sequence_len: int) -> list[list[int]]:
    starts = range(0, len(tokens) - sequence_len + 1, sequence_len)
    return [[bos_id, *tokens[start : start + sequence_len]] for start in starts]


def _spread(documents: Sequence[Document], count: int) -> list[Document]:
    """At most `count` documents at even distances."""
    count = min(len(documents), count)
    return [documents[index * len(documents) // count] for index in range(count)]
