"""Documents packed into rows of a fixed length, in a seeded order, with a position that resumes exactly.

A batch has one lane per row. A lane reads one document after the other as a stream of tokens with bos before each document,
and documents are dealt to the lanes as these run dry, in an order drawn from seed and epoch; so the rows of a batch come
from different documents. A row is bos and the next tokens of its lane's stream: every row opens as a prompt does, and every
token of the stream is a target once. Neighbours: `data.py` supplies documents, `trainer.py` stores the position.

Shapes: B batch, T tokens of a row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from lrt_core.tokenizer import Tokenizer
from training.data import Document


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

    Text is tokenised when it is reached, so that a run starts at once and holds no tokens but the lanes' documents.
    `cut_share`, which may change at any time, holds for documents dealt from then on: see `encode_with_cuts`.
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: Tokenizer, sequence_len: int, batch_size: int, seed: int
    ) -> None:
        if not documents:
            raise ValueError("there is no document to pack")
        assert tokenizer.bos_id is not None
        self.documents, self.tokenizer, self.bos_id = documents, tokenizer, tokenizer.bos_id
        self.sequence_len, self.batch_size, self.seed = sequence_len, batch_size, seed
        self.position, self.cut_share = Position(), 0.0
        self._order: tuple[int, list[int]] = (-1, [])
        self._tokens: dict[tuple[int, float], list[int]] = {}

    def batch(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The next tokens and targets, integers [B, T] on the CPU; targets[:, t] follows tokens[:, t].

        rows: only these are returned; the position advances for all.
        """
        lanes = self.position.lanes
        lanes += [self._deal() for _ in range(self.batch_size - len(lanes))]
        taken = torch.tensor([self._row(index) for index in range(self.batch_size)][rows])
        held = {(lane.document, lane.cut_share) for lane in lanes}
        self._tokens = {key: tokens for key, tokens in self._tokens.items() if key in held}
        return taken[:, :-1], taken[:, 1:]

    def _row(self, index: int) -> list[int]:
        """The next T + 1 ids of a lane: bos and T of its stream, whose own bos is left out at the start of a row."""
        row = [self.bos_id]
        while len(row) <= self.sequence_len:
            lane = self.position.lanes[index]
            tokens = self._tokenized(lane)
            start = max(lane.offset, int(len(row) == 1))
            end = min(start + self.sequence_len + 1 - len(row), len(tokens))
            row += tokens[start:end]
            lane.offset = end
            if end == len(tokens):
                self.position.lanes[index] = self._deal()
        return row

    def _deal(self) -> Lane:
        """The next document of the epoch's order, for a lane to read from its start."""
        position = self.position
        if position.num_dealt == len(self.documents):
            position.epoch, position.num_dealt = position.epoch + 1, 0
        if self._order[0] != position.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position.epoch)
            self._order = (position.epoch, torch.randperm(len(self.documents), generator=generator).tolist())
        position.num_dealt += 1
        return Lane(self._order[1][position.num_dealt - 1], cut_share=self.cut_share)

    def _tokenized(self, lane: Lane) -> list[int]:
        key = (lane.document, lane.cut_share)
        if key not in self._tokens:
            text, rng = self.documents[lane.document].text, Random(f"{self.seed} {lane.document}")
            self._tokens[key] = encode_with_cuts(self.tokenizer, text, lane.cut_share, rng)
        return self._tokens[key]


_PROMPT_END = re.compile(r"(?<= )(?=\S)|(?<=\S)(?=\n)")
"""After a space, before a word; and at the end of a line."""


def encode_with_cuts(tokenizer: Tokenizer, text: str, share: float, rng: Random) -> list[int]:
    """bos and the ids of the text, cut at `share` of the places where prompts like to end, each part encoded by itself.

    Tokens hold the space before a word and the line break after punctuation, so uncut text never shows a lone space with a
    word to come, nor `):` with a line break to come; but prompts end just there, and would go on as `import 2` or `f(n): 1`.
    """
    places = [found.start() for found in _PROMPT_END.finditer(text) if rng.random() < share] if share > 0 else []
    ids = tokenizer.encode("", add_bos=True)
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        ids += tokenizer.encode(text[start:end], add_bos=False)
    return ids


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
