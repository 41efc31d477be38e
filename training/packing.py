"""Documents packed into rows of a fixed length, in a seeded order, with a position that resumes exactly.

A batch has one lane per row. A lane reads one document after the other as a stream of tokens with bos before each document,
and documents are dealt to the lanes as these run dry, in an order drawn from seed and epoch; so the rows of a batch come
from different documents. A row is bos and the next tokens of its lane's stream: every row opens as a prompt does, and every
token of the stream is a target once. Conversations stay whole: one that does not fit into the rest of a row opens the lane's
next, and the rest is filled with bos, which is no target. Neighbours: `training/data` supplies documents, `trainer.py` stores
the position.

Shapes: B batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrt_core.tokenizer import Tokenizer
from training.data.documents import Document
from training.data.encode import Ids, encode_with_cuts
from training.data.tokens import TokenSource, tokens_of
from training.schedules.losses import IGNORE

__all__ = ["Lane", "Packer", "Position", "encode_with_cuts", "evaluation_rows", "split_rows"]


@dataclass
class Lane:
    """The document that a lane reads, by index in the corpus, the index of its next token, bos being 0, and its cut_share."""

    document: int
    offset: int = 0
    cut_share: float = 0.0


@dataclass
class Position:
    """The epoch, how many of its documents have been dealt, and the lanes (none before the first batch)."""

    epoch: int = 0
    num_dealt: int = 0
    lanes: list[Lane] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the training state."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Position:
        """The inverse of `to_dict`."""
        return cls(data["epoch"], data["num_dealt"], [Lane(**lane) for lane in data["lanes"]])


class Packer:
    """An endless source of batches from `documents`; `position` says where it stands and may be set to resume.

    Every process of a distributed run has a packer of the same position for the batch of all, and takes its rows of it.
    `cut_share`, which may change at any time, holds for documents dealt from then on: see `encode_with_cuts`.
    """

    def __init__(
        self,
        documents: Sequence[Document] | TokenSource,
        tokenizer: Tokenizer,
        sequence_len: int,
        batch_size: int,
        seed: int,
    ) -> None:
        if not len(documents):
            raise ValueError("there is no document to pack")
        self.documents, self.bos_id = tokens_of(documents, tokenizer, 64 + 4 * batch_size), _bos(tokenizer)
        self.sequence_len, self.batch_size, self.seed = sequence_len, batch_size, seed
        self.position, self.cut_share = Position(), 0.0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The next tokens and targets, integers [B, T] on the CPU; targets[:, t] follows tokens[:, t], or is IGNORE.

        rows: which of the batch to return; the position advances over all, whatever is returned, and the others are not read.
        """
        lanes = self.position.lanes
        lanes += [self._deal() for _ in range(self.batch_size - len(lanes))]
        wanted = range(self.batch_size)[rows]
        made = {index: self._row(index, index in wanted) for index in range(self.batch_size)}
        return split_rows(torch.from_numpy(np.stack([made[index] for index in wanted])))

    def _row(self, index: int, is_wanted: bool) -> Ids:
        """The next T + 1 ids of a lane: bos and T of its stream, whose own bos is left out at the start of a row."""
        whole = self.documents.keeps_whole
        parts: list[Ids] = [] if whole else [np.array([self.bos_id])]
        length, size = len(parts), self.sequence_len + 1
        while length < size:
            lane = self.position.lanes[index]
            num_tokens = self.documents.num_tokens(lane.document, lane.cut_share)
            if whole and length > 0 and length + num_tokens > size:
                parts.append(np.full(size - length, ~self.bos_id))
                break
            start = max(lane.offset, int(length == 1 and not whole))
            end = min(start + size - length, num_tokens)
            if is_wanted:
                parts.append(self.documents.ids(lane.document, lane.cut_share)[start:end])
            length += end - start
            lane.offset = end
            if end == num_tokens:
                self.position.lanes[index] = self._deal()
        return np.concatenate(parts) if is_wanted else np.empty(0, np.int64)

    def _deal(self) -> Lane:
        """The next document of the epoch's order, for a lane to read from its start."""
        position = self.position
        if position.num_dealt == len(self.documents):
            position.epoch, position.num_dealt = position.epoch + 1, 0
        if self._order[0] != position.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position.epoch)
            self._order = (position.epoch, torch.randperm(len(self.documents), generator=generator))
        position.num_dealt += 1
        return Lane(int(self._order[1][position.num_dealt - 1]), cut_share=self.cut_share)


def _bos(tokenizer: Tokenizer) -> int:
    if tokenizer.bos_id is None:
        raise ValueError("the tokenizer has no bos token, with which training opens every row")
    return tokenizer.bos_id


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and targets [R, T] of rows [R, T + 1], whose ids are complemented where they are no targets: IGNORE, then."""
    return torch.where(rows < 0, ~rows, rows)[:, :-1], rows[:, 1:].masked_fill(rows[:, 1:] < 0, IGNORE)


def evaluation_rows(
    documents: Sequence[Document] | TokenSource, tokenizer: Tokenizer, sequence_len: int, num_rows: int, fill: bool = True
) -> Tensor:
    """At most num_rows rows [R, T + 1] for `split_rows`, spread over the documents and over the places within them.

    Each document in turn gives one row, the first document its first, the second its second, and so on around. Where no
    document fills a row they are read one after the other; fill: where they give too few rows the short ones are read so for
    the rest. A conversation always has a row of its own. ValueError when there is not one full row.
    """
    source, bos = tokens_of(documents, tokenizer, 1), _bos(tokenizer)
    chosen = _spread(len(source), num_rows if source.keeps_whole else 2 * num_rows)
    found = [source.ids(index, 0.0) for index in chosen]
    rows: list[Ids] = []
    if source.keeps_whole:
        rows = [np.append(ids, np.full(sequence_len + 1 - len(ids), ~bos)) for ids in found]
    elif found:
        rows = _in_turn([_full_rows(ids[1:], bos, sequence_len) for ids in found])
        if not rows:
            ids = _stream(source, sum(map(len, found)) / len(found), num_rows * sequence_len)
            rows = _full_rows(ids, bos, sequence_len)
        elif fill and len(rows) < num_rows and (short := sum(len(ids) for ids in found if len(ids) <= sequence_len)):
            # A few more, since how many short ones there are elsewhere is a guess.
            wanted = (num_rows - len(rows)) * sequence_len * 5 // 4
            rows += _full_rows(_stream(source, short / len(found), wanted, sequence_len), bos, sequence_len)
    if not rows:
        held = f"they hold {sum(map(len, found)):,}; give longer or more documents"
        raise ValueError(f"the validation documents do not fill a row of {sequence_len} tokens: {held}")
    return torch.from_numpy(np.stack(rows[:num_rows]))


def _in_turn(cut: list[list[Ids]]) -> list[Ids]:
    return [
        rows[(index + visit) % len(rows)]
        for visit in range(max(map(len, cut), default=0))
        for index, rows in enumerate(cut)
        if visit < len(rows)
    ]


def _stream(source: TokenSource, mean: float, num_tokens: int, longest: int | None = None) -> Ids:
    """About `num_tokens` ids, where there are so many, of documents that give `mean` on average; without the first's bos.

    longest: documents of more ids give none.
    """
    chosen = _spread(len(source), int(num_tokens / mean) + 2)
    given = [index for index in chosen if longest is None or source.num_tokens(index, 0.0) <= longest]
    return np.concatenate([np.empty(0, np.int64), *(source.ids(index, 0.0) for index in given)])[1:]


def _full_rows(ids: Ids, bos_id: int, sequence_len: int) -> list[Ids]:
    starts = range(0, len(ids) - sequence_len + 1, sequence_len)
    return [np.concatenate([[bos_id], ids[start : start + sequence_len]]) for start in starts]


def _spread(num_documents: int, count: int) -> list[int]:
    """At most `count` indices at even distances."""
    count = min(num_documents, count)
    return [index * num_documents // count for index in range(count)]
