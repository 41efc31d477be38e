"""The arithmetic of a refinement window that slides over a prompt; plain numbers, no torch. `refine.py` has the passes.

Source: windowed refinement is this project's form of the paper's parallel refinement (section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PERIOD = 8
"""Passes between two looks at the window's width: after the first passes over a prompt few positions settle by nature."""
WASTEFUL = 12.0
"""Rows per settled position above which the window halves; a trained recurrence takes 4 to 10."""
FUTILE = 0.75
"""Rows per settled position, as a share of the window's width, above which it halves too: nearly one position a pass. Where the
step's budget made the passes narrower than the window, of their width."""
TELLING = 4
"""Rows of a pass that was cut short from which on it says so much."""
CHEAP = 8.0
"""Rows per settled position below which it doubles, up to its maximum, if all its passes were as wide as it allowed: a window
that the step's budget or the prompt's end cut short says nothing about a wider one."""


def num_settled(changes: Sequence[float], tolerance: float) -> int:
    """How many leading rows of a window of len(changes) + 1 rows are final after a pass.

    changes[j] is the relative change, in this pass, of the memory that enters row j + 1. Row 0's memory was final already, so
    it always settles; each next row does while what entered it was within tolerance of what should have.
    """
    count = 1
    for change in changes:
        if not change <= tolerance:
            break
        count += 1
    return count


@dataclass
class WindowControl:
    """The width of one sequence's windows, in positions: as wide as allowed while passes settle enough, narrower where the
    recurrence does not contract and wide passes would be computed in vain."""

    maximum: int
    width: int = field(init=False)
    _passes: int = 0
    _rows: int = 0
    _settled: int = 0

    def __post_init__(self) -> None:
        self.width = self.maximum

    def observe(self, num_settled: int, num_rows: int) -> None:
        """A pass over num_rows positions settled num_settled."""
        self._passes += 1
        self._rows += num_rows
        self._settled += num_settled
        if self._passes < PERIOD:
            return
        cost, mean = self._rows / self._settled, self._rows / self._passes
        counted = mean if mean >= TELLING else self.width
        if self.width > 1 and cost > min(WASTEFUL, FUTILE * counted):
            self.width //= 2
        elif cost < CHEAP and self._rows == self._passes * self.width:
            self.width = min(self.maximum, self.width * 2)
        self._passes = self._rows = self._settled = 0
