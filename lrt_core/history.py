"""The tokens that a sample has seen, counted as they come, so that penalties cost what is new and not all there was. No torch.

Neighbours: `sampling.py` reads it; whoever generates keeps one per sample and adds to it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class TokenHistory:
    """Distinct ids of prompt and output in `ids`; beside each in `counts`, how often the output has it."""

    def __init__(self, prompt_ids: Iterable[int], output_ids: Iterable[int] = ()) -> None:
        self.ids = array("q", dict.fromkeys(prompt_ids))
        self.counts = array("q", bytes(self.ids.itemsize * len(self.ids)))
        self.num_outputs = 0
        self._places = {id: place for place, id in enumerate(self.ids)}
        self.extend(output_ids)

    def extend(self, output_ids: Iterable[int]) -> None:
        """Count further tokens of the output."""
        for id in output_ids:
            place = self._places.setdefault(id, len(self.ids))
            if place == len(self.ids):
                self.ids.append(id)
                self.counts.append(0)
            self.counts[place] += 1
            self.num_outputs += 1
