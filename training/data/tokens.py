"""Where rows come from: documents as arrays of ids, from texts in memory or shards. Neighbours: `shards.py`, `packing.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lrt_core.tokenizer import Tokenizer
from training.data.documents import Document
from training.data.encode import Ids, encode_document


class TokenSource(Protocol):
    """Documents by index. cut_share as in `encode_with_cuts`."""

    @property
    def keeps_whole(self) -> bool:
        """Whether a document must lie whole in a row, as conversations do."""

    def __len__(self) -> int: ...

    def num_tokens(self, index: int, cut_share: float) -> int:
        """How many ids a document has."""

    def ids(self, index: int, cut_share: float) -> Ids:
        """Its ids [N], bos first; the complements `~id` of those that are no targets."""


class TextTokens:
    """Texts in memory, tokenised when they are reached; the last few are kept."""

    keeps_whole = False

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer, num_kept: int) -> None:
        self.documents, self.tokenizer, self.num_kept = documents, tokenizer, num_kept
        self._kept: dict[tuple[int, float], Ids] = {}

    def __len__(self) -> int:
        return len(self.documents)

    def num_tokens(self, index: int, cut_share: float) -> int:
        """See TokenSource."""
        return len(self.ids(index, cut_share))

    def ids(self, index: int, cut_share: float) -> Ids:
        """See TokenSource."""
        key = (index, cut_share)
        if key not in self._kept:
            if len(self._kept) >= self.num_kept:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = np.array(encode_document(self.tokenizer, self.documents[index], cut_share))
        return self._kept[key]


def tokens_of(documents: Sequence[Document] | TokenSource, tokenizer: Tokenizer, num_kept: int) -> TokenSource:
    """The documents as ids, unless they are ids already."""
    return TextTokens(documents, tokenizer, num_kept) if isinstance(documents, Sequence) else documents
