"""The figures of a study: a row per variant and budget, each beside the plain model at equal tokens, compute and time.

The plain model's BPB between its own budgets is interpolated by the parabola through the budgets around it and the nearest
other, over the logarithm of what is equal: a straight line would lie above the curve, to the recurrence's favour. Beyond them
nothing is said. Neighbours: `report.py`, `plots.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
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
    the seeds, None for one. by_seed: sequential of each. contraction: mean, None where no run told one.
    """

    variant: str
    tokens_per_parameter: float
    num_seeds: int
    parameters: int
    costs: dict[str, float]
    sequential: float
    merged: float
    spread: float | None
    by_seed: dict[int, float]
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
        by_seed={one["seed"]: one["sequential_bpb"] for one in own},
        contraction=statistics.mean(contractions) if contractions else None,
    )


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Every row of a recurrent variant beside the plain model's, over the seeds that both have."""
    plain = [row for row in rows if row.variant == BASELINE]

    def difference(row: Row, measure: str) -> float | None:
        found = []
        for seed, own in row.by_seed.items():
            points = [(one.costs[measure], one.by_seed[seed]) for one in plain if measure in one.costs and seed in one.by_seed]
            other = interpolated(points, row.costs[measure])
            found += [] if other is None else [own - other]
        return statistics.mean(found) if found else None

    return [
        Comparison(row, {measure: difference(row, measure) for measure in row.costs}) for row in rows if row.variant != BASELINE
    ]


NEAR = 0.03
"""By how much of itself a cost may lie beyond the last budget and count as that: budgets are rounded to whole steps."""


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The parabola over log x through the points (x > 0, y) on both sides of x and the nearest other; of two the line.

    None outside of them. Points of one x count as their mean.
    """
    by_x: dict[float, list[float]] = {}
    for place, value in points:
        by_x.setdefault(place, []).append(value)
    places = sorted(by_x)
    if not places or not places[0] / (1 + NEAR) <= x <= places[-1] * (1 + NEAR):
        return None
    at = math.log(min(max(x, places[0]), places[-1]))
    above = next((index for index, place in enumerate(places) if math.log(place) >= at), len(places) - 1)
    around = places[max(0, above - 1) : above + 1]
    nearest = sorted(places, key=lambda place: (place not in around, abs(math.log(place) - at)))[:3]
    known = [(math.log(place), statistics.mean(by_x[place])) for place in nearest]
    # Lagrange's form: exact at the points.
    return sum(value * math.prod((at - other) / (own - other) for other, _ in known if other != own) for own, value in known)
