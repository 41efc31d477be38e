"""What a study found: a row per variant and budget, each beside the plain model at equal tokens, compute and time.

The plain model's BPB between its own budgets is interpolated, linearly in the logarithm of what is equal; beyond them nothing
is said.
Writes report.md, results.csv and, where matplotlib is, the pictures of `plots.py`.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
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


def write(folder: Path, results: Sequence[Result], timing: Timing, num_missing: int) -> list[Path]:
    """Write the report of what is there so far; returns its files."""
    rows = tabulate(results, timing)
    pictures = []
    if importlib.util.find_spec("matplotlib") is not None:
        from training.study import plots

        pictures = plots.draw(rows, folder)
    files = [_write_csv(folder / "results.csv", results), folder / "report.md"]
    num_tokens = max(result["evaluated_tokens"] for result in results)
    files[1].write_text(markdown(rows, num_tokens, num_missing, pictures), "utf-8")
    return [*files, *pictures]


_COLUMNS = [
    "cell",
    "variant",
    "seed",
    "schedule",
    "tokens_per_parameter",
    "parameters",
    "steps",
    "tokens",
    "forwards_per_step",
    "effective_tokens",
    "sequential_bpb",
    "merged_bpb",
    "contraction",
    "seconds",
]


def _write_csv(path: Path, results: Sequence[Result]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for result in sorted(results, key=lambda one: (one["variant"], one["tokens_per_parameter"], one["seed"])):
            writer.writerow([result[column] for column in _COLUMNS])
    return path


def markdown(rows: Sequence[Row], num_tokens: int, num_missing: int, pictures: Sequence[Path]) -> str:
    """The report; num_tokens: what was evaluated."""
    comparisons = compare(rows)
    sections = [
        "# What the recurrence bought",
        f"Bits per byte (BPB), less is better, on {num_tokens:,} validation tokens. *Sequential*: token by token with the true "
        "recurrence, as served: the one that counts. *Merged* is parallel, each position by the last forward that computed it. "
        "*Compute* counts a token once for every forward in which a training step computes it. *Time on* a device: the steps "
        "times the median step, measured there alone. Spread: largest less smallest of the seeds.",
        *([f"**{num_missing} runs of the plan are missing.**"] if num_missing else []),
        "## All runs",
        _table_of_rows(rows),
        "## Beside the plain model",
        "Sequential BPB less the plain model's at as many tokens, as much compute, as much time: below zero the recurrence "
        "wins. The plain model is interpolated between its budgets; a dash: it was not trained for so little or so long.",
        _table_of_comparisons(comparisons),
        *_verdicts(comparisons, max((row.spread for row in rows if row.spread is not None), default=0.0)),
        *(f"![{path.stem}]({path.name})" for path in pictures),
    ]
    return "\n\n".join(sections) + "\n"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def _table_of_rows(rows: Sequence[Row]) -> str:
    measures = list(rows[0].costs)
    heads = ["variant", "tokens / parameter", "parameters", *measures, "sequential", "spread", "merged", "contraction"]
    return _table(heads, [_cells(row, measures) for row in rows])


def _cells(row: Row, measures: Sequence[str]) -> list[str]:
    return [
        row.variant,
        f"{row.tokens_per_parameter:g}",
        f"{row.parameters:,}",
        *(_cost(measure, row.costs.get(measure)) for measure in measures),
        f"{row.sequential:.4f}",
        f"{row.spread:.4f} ({row.num_seeds} seeds)" if row.spread is not None else "",
        f"{row.merged:.4f}",
        f"{row.contraction:.3f}" if row.contraction is not None else "",
    ]


def _cost(measure: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} s" if measure.startswith("time") else f"{value / 1e6:.2f}M"


def _table_of_comparisons(comparisons: Sequence[Comparison]) -> str:
    measures = list(dict.fromkeys(measure for one in comparisons for measure in one.differences))
    lines = []
    for one in comparisons:
        values = [one.differences.get(measure) for measure in measures]
        said = ["-" if value is None else f"{value:+.4f}" for value in values]
        lines.append([one.row.variant, f"{one.row.tokens_per_parameter:g}", *said])
    return _table(["variant", "tokens / parameter", *(f"at equal {measure}" for measure in measures)], lines)


def _verdicts(comparisons: Sequence[Comparison], margin: float) -> list[str]:
    """A sentence for each measure: how often the recurrence wins by more than seeds differ, and its best."""
    said = []
    beyond = f", by more than the largest spread between seeds ({margin:.4f})" if margin else ""
    for measure in dict.fromkeys(measure for one in comparisons for measure in one.differences):
        values = [(value, one.row) for one in comparisons if (value := one.differences.get(measure)) is not None]
        if not values:
            continue
        wins = sum(value < -margin for value, _ in values)
        losses = sum(value > margin for value, _ in values)
        best, row = min(values, key=lambda pair: pair[0])
        said.append(
            f"At equal {measure} the recurrence wins {wins} and loses {losses} of {len(values)} comparisons{beyond}; the best "
            f"is {row.variant} at {row.tokens_per_parameter:g} tokens per parameter, {best:+.4f}."
        )
    return said
