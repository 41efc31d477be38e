"""Documents to ids, as training reads them: text with bos before it, or conversations with what is scored.

An id that is no target is stored as its complement, `~id`, in arrays of signed integers: so ids and loss mask travel as one.
Neighbours: `sharding.py` runs encoders in processes of their own, `tokens.py` for texts in memory, `packing.py` makes rows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrt_core.chat import ChatError, ChatTemplate, ChatTemplateError
from lrt_core.tokenizer import Tokenizer, TokenizerError
from training.data.corpus import training_pieces
from training.data.documents import Document, hash64
from training.data.records import DataError

Ids = NDArray[np.int64]

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


def encode_document(tokenizer: Tokenizer, document: Document, cut_share: float) -> list[int]:
    """A document's ids with its cuts, which depend on its name alone."""
    return encode_with_cuts(tokenizer, document.text, cut_share, Random(document.name))


class ConversationEncoder:
    """Conversations through the tokenizer's chat template, at most `num_tokens` ids each; DataError without a usable one."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int) -> None:
        if tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template, so conversations cannot be rendered")
        self.num_tokens, self._byte_lengths = num_tokens, np.array(tokenizer.byte_lengths())
        try:
            self._template = ChatTemplate(tokenizer.chat_template, tokenizer)
        except ChatTemplateError as error:
            raise DataError(f"the tokenizer's chat template cannot be used: {error}") from None

    def encode(self, document: Document) -> tuple[Ids, bool]:
        """Ids, complements where the assistant did not speak, and whether they were cut; ChatError for what teaches nothing."""
        messages: list[dict[str, str]] = json.loads(document.text)
        rendered = self._template.render(messages)
        if rendered.assistant_mask is None:
            raise ChatError("the chat template changes these messages so that the assistant's part cannot be told")
        ids, scored = np.array(rendered.ids[: self.num_tokens]), np.array(rendered.assistant_mask[: self.num_tokens])
        if not self._byte_lengths[ids[1:][scored[1:]]].any():
            raise ChatError(f"no text of the assistant within the first {self.num_tokens - 1} tokens")
        return np.where(scored, ids, ~ids), len(rendered.ids) > self.num_tokens


ENTRY = np.dtype(
    [("start", "<u8"), ("length", "<u4"), ("characters", "<u4"), ("name", "<u8"), ("document", "<u8"), ("validates", "<u1")]
)
"""What the index says of a run of ids. start: place in the shards; document: number in the corpus; name: hash of its name."""


@dataclass
class Batch:
    """Encoded documents. ids: of all, one after the other. entries: ENTRY, `document` counted within the batch, no `start`.

    hashes: of every document's name and text, [N, 2]; skipped and cut say which and why.
    """

    ids: Ids
    entries: NDArray[Any]
    hashes: NDArray[np.uint64]
    skipped: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Encoder:
    """What makes ids of documents for shards; travels to other processes.

    limit: of the hashes that validate. conversation_tokens: most ids of a conversation, None for text.
    """

    tokenizer: Tokenizer
    limit: int
    piece_characters: int
    cut_share: float = 0.0
    conversation_tokens: int | None = None

    def encode(self, documents: list[Document]) -> Batch:
        """All documents; one that the tokenizer or the chat template refuses is skipped."""
        chat = None if self.conversation_tokens is None else ConversationEncoder(self.tokenizer, self.conversation_tokens)
        parts: list[Ids] = []
        rows: list[tuple[int, int, int, int, int, bool]] = []
        batch = Batch(np.empty(0, np.int64), np.empty(0, ENTRY), np.empty((0, 2), np.uint64))
        hashes = [(hash64(document.name), hash64(document.text)) for document in documents]
        for number, document in enumerate(documents):
            place = hashes[number][0]
            try:
                found = self._encode(document, place < self.limit, chat, batch)
            except (ChatError, TokenizerError) as error:
                batch.skipped.append(f"{document.name}: {error}")
                continue
            for ids, characters in found:
                parts.append(ids)
                rows.append((0, len(ids), characters, place, number, place < self.limit))
        batch.ids = np.concatenate(parts) if parts else batch.ids
        batch.entries = np.array(rows, ENTRY)
        batch.hashes = np.array(hashes, np.uint64).reshape(-1, 2)
        return batch

    def _encode(
        self, document: Document, validates: bool, chat: ConversationEncoder | None, batch: Batch
    ) -> list[tuple[Ids, int]]:
        """Ids and number of characters of what one document gives."""
        if chat is not None:
            ids, is_cut = chat.encode(document)
            if is_cut:
                batch.cut.append(f"{document.name}: cut to {len(ids) - 1} tokens")
            return [(ids, len(document.text))]
        parts = [document] if validates else training_pieces(document, self.piece_characters)
        share = 0.0 if validates else self.cut_share
        return [(np.array(encode_document(self.tokenizer, part, share)), len(part.text)) for part in parts]
