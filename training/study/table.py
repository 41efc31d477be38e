"""The figures of a study: a row per variant and budget, each beside the plain model at equal tokens, compute and time.

The plain model's BPB between its own budgets is interpolated, linearly in the logarithm of what is equal; beyond them nothing
is said. Neighbours: `report.py`, `plots.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from training.study.plan import BASELINE

Result = dict[str, Any]
Timing = dict[str, dict[str, list[float]]]
"""By device and variant, seconds of steps."""


@dataclass(frozen=True)
class Row:
    """All seeds of one variant at one budget.

    costs: what training cost by each measure: `tokens`, `compute` (effective tokens), and `time on DEVICE`, the seconds of all
    steps at the pace measured alone there. sequential, merged: mean bits per byte; spread: largest less smallest sequential of
    the seeds, None for one. contraction: mean, None where no run told one.
    """

    variant: str
    tokens_per_parameter: float
    num_seeds: int
    parameters: int
    costs: dict[str, float]
    sequential: float
    merged: float
    spread: float | None
    contraction: float | None


@dataclass(frozen=True)
class Comparison:
    """A row's sequential bits per byte less the plain model's at equal cost, by measure; None where the plain one has none."""

    row: Row
    differences: dict[str, float | None]


def tabulate(results: Sequence[Result], timing: Timing) -> list[Row]:
    """A row per variant and budget, the plain model first, then by name, budgets ascending."""
    groups: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result["variant"], result["tokens_per_parameter"]), []).append(result)
    return [_row(groups[key], timing) for key in sorted(groups, key=lambda key: (key[0] != BASELINE, *key))]


def _row(own: list[Result], timing: Timing) -> Row:
    first = own[0]
    sequential = [one["sequential_bpb"] for one in own]
    contractions = [one["contraction"] for one in own if one["contraction"] is not None]
    seconds = {device: known[first["variant"]] for device, known in sorted(timing.items()) if first["variant"] in known}
    times = {f"time on {device}": first["steps"] * statistics.median(steps) for device, steps in seconds.items()}
    return Row(
        variant=first["variant"],
        tokens_per_parameter=first["tokens_per_parameter"],
        num_seeds=len(own),
        parameters=first["parameters"],
        costs={"tokens": first["tokens"], "compute": first["effective_tokens"], **times},
        sequential=statistics.mean(sequential),
        merged=statistics.mean(one["merged_bpb"] for one in own),
        spread=max(sequential) - min(sequential) if len(own) > 1 else None,
        contraction=statistics.mean(contractions) if contractions else None,
    )


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Every row of a recurrent variant beside the plain model's."""
    plain = [row for row in rows if row.variant == BASELINE]

    def difference(row: Row, measure: str) -> float | None:
        points = [(one.costs[measure], one.sequential) for one in plain if measure in one.costs]
        other = interpolated(points, row.costs[measure])
        return None if other is None else row.sequential - other

    return [
        Comparison(row, {measure: difference(row, measure) for measure in row.costs}) for row in rows if row.variant != BASELINE
    ]


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The line through points (x > 0, y) at x, straight over log x between neighbours; None outside of them."""
    points = sorted(points)
    for left, right in pairwise(points):
        if left[0] <= x <= right[0]:
            share = (math.log(x) - math.log(left[0])) / (math.log(right[0]) - math.log(left[0]))
            return left[1] + share * (right[1] - left[1])
    return points[0][1] if points and points[0][0] == x else None
