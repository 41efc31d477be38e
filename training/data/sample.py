"""Texts to learn a tokenizer from: a bounded sample of a corpus of any size. Neighbour: `training/tokenizer.py` learns."""

from __future__ import annotations

import heapq

from tqdm import tqdm

from training.data.corpus import training_pieces
from training.data.documents import Sources, advancing, fitting_limit, hash64, validation_limit


def sample_texts(sources: Sources, validation_fraction: float, piece_characters: int, max_bytes: int, seed: int) -> list[str]:
    """Training pieces of `max_bytes` UTF-8 bytes or a little more, or all there are, as seed and texts decide.

    Reads the whole corpus once and holds no more than the sample. Equal texts count once. DataError as for shards.
    """
    limit = validation_limit(validation_fraction)
    while True:
        sample = _Sample(max_bytes, seed)
        hashes: set[int] = set()
        with tqdm(total=sources.num_bytes, desc="sampling text", unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for document in sources.documents(lambda line: None, advancing(bar)):
                place = hash64(document.name)
                hashes = {min((*hashes, place)), max((*hashes, place))}
                if place >= limit:
                    for piece in training_pieces(document, piece_characters):
                        sample.add(piece.text)
        fitting = fitting_limit(limit, sorted(hashes), sources.names)
        if fitting == limit:
            return sample.texts()
        limit = fitting


class _Sample:
    """The texts whose hashes are lowest, as many as fill `max_bytes`."""

    def __init__(self, max_bytes: int, seed: int) -> None:
        self._max_bytes, self._seed, self._num_bytes = max_bytes, seed, 0
        self._heap: list[tuple[int, str]] = []
        self._held: set[int] = set()

    def add(self, text: str) -> None:
        """Take the text, unless it is there or does not belong to the lowest."""
        rank = -hash64(f"{self._seed} {text}")
        if rank in self._held:
            return
        heapq.heappush(self._heap, (rank, text))
        self._held.add(rank)
        self._num_bytes += len(text.encode("utf-8"))
        while self._num_bytes - (size := len(self._heap[0][1].encode("utf-8"))) >= self._max_bytes:
            self._held.remove(heapq.heappop(self._heap)[0])
            self._num_bytes -= size

    def texts(self) -> list[str]:
        """The sample, lowest first."""
        return [text for _, text in sorted(self._heap, reverse=True)]
