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


@dataclass(frozen=True)
class Row:
    """All seeds of one variant at one budget.

    sequential, merged: mean bits per byte; spread: largest less smallest sequential of the seeds, None for one. wall: seconds
    of all steps at the pace measured alone. contraction: mean, None where no run told one.
    """

    variant: str
    tokens_per_parameter: float
    num_seeds: int
    parameters: int
    tokens: int
    effective: int
    wall: float
    sequential: float
    merged: float
    spread: float | None
    contraction: float | None


@dataclass(frozen=True)
class Comparison:
    """A row less the plain model, in bits per byte, at equal tokens, effective tokens, wall time; None where none is there."""

    row: Row
    tokens: float | None
    effective: float | None
    wall: float | None


def tabulate(results: Sequence[Result], timing: dict[str, Any]) -> list[Row]:
    """Rows in the order of the variants' first results' budgets: variant by variant, ascending."""
    groups: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result["variant"], result["tokens_per_parameter"]), []).append(result)
    return [_row(groups[key], timing) for key in sorted(groups, key=lambda key: (key[0] != BASELINE, *key))]


def _row(own: list[Result], timing: dict[str, Any]) -> Row:
    first = own[0]
    sequential = [one["sequential_bpb"] for one in own]
    contractions = [one["contraction"] for one in own if one["contraction"] is not None]
    return Row(
        variant=first["variant"],
        tokens_per_parameter=first["tokens_per_parameter"],
        num_seeds=len(own),
        parameters=first["parameters"],
        tokens=first["tokens"],
        effective=first["effective_tokens"],
        wall=first["steps"] * statistics.median(timing[first["variant"]]["step_seconds"]),
        sequential=statistics.mean(sequential),
        merged=statistics.mean(one["merged_bpb"] for one in own),
        spread=max(sequential) - min(sequential) if len(own) > 1 else None,
        contraction=statistics.mean(contractions) if contractions else None,
    )


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Every row of a recurrent variant beside the plain model's."""
    plain = [row for row in rows if row.variant == BASELINE]

    def less_plain(row: Row, key: str) -> float | None:
        other = interpolated([(getattr(one, key), one.sequential) for one in plain], getattr(row, key))
        return None if other is None else row.sequential - other

    return [
        Comparison(row, *(less_plain(row, key) for key in ("tokens", "effective", "wall")))
        for row in rows
        if row.variant != BASELINE
    ]


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The line through points (x > 0, y) at x, straight over log x between neighbours; None outside of them."""
    points = sorted(points)
    for left, right in pairwise(points):
        if left[0] <= x <= right[0]:
            share = (math.log(x) - math.log(left[0])) / (math.log(right[0]) - math.log(left[0]))
            return left[1] + share * (right[1] - left[1])
    return points[0][1] if points and points[0][0] == x else None


def write(folder: Path, results: Sequence[Result], timing: dict[str, Any], num_missing: int) -> list[Path]:
    """Write the report of what is there so far; returns its files."""
    rows = tabulate(results, timing)
    pictures = []
    if importlib.util.find_spec("matplotlib") is not None:
        from training.study import plots

        pictures = plots.draw(rows, folder)
    files = [_write_csv(folder / "results.csv", results, timing), folder / "report.md"]
    files[1].write_text(markdown(rows, results, timing, num_missing, pictures), "utf-8")
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


def _write_csv(path: Path, results: Sequence[Result], timing: dict[str, Any]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, "step_seconds_alone"])
        for result in sorted(results, key=lambda one: (one["variant"], one["tokens_per_parameter"], one["seed"])):
            alone = statistics.median(timing[result["variant"]]["step_seconds"])
            writer.writerow([*(result[column] for column in _COLUMNS), alone])
    return path


def markdown(
    rows: Sequence[Row], results: Sequence[Result], timing: dict[str, Any], num_missing: int, pictures: Sequence[Path]
) -> str:
    """The report."""
    devices = sorted({one["device"] for one in timing.values()})
    evaluated = sorted({result["evaluated_tokens"] for result in results})
    sections = [
        "# What the recurrence bought",
        "Bits per byte (BPB), less is better, on "
        f"{' or '.join(f'{number:,}' for number in evaluated)} validation tokens. *Sequential* is token by token with the true "
        "recurrence, as served: the one that counts. *Merged* is parallel, each position by the last forward that computed it. "
        "*Effective* tokens count a token once for every forward in which a training step computes it. Wall time: steps "
        f"times the median step measured alone on {', '.join(devices)}. Spread: largest less smallest of the seeds.",
        *([f"**{num_missing} runs of the plan are missing.**"] if num_missing else []),
        "## All runs",
        _table_of_rows(rows),
        "## Beside the plain model",
        "Sequential BPB less the plain model's at as many tokens, as much effective compute, as much wall time; below zero the "
        "recurrence wins. The plain model is interpolated between its budgets; a dash: it was not trained for so little or so "
        "long.",
        _table_of_comparisons(compare(rows)),
        *_verdicts(compare(rows), _noise(rows)),
        *(f"![{path.stem}]({path.name})" for path in pictures),
    ]
    return "\n\n".join(sections) + "\n"


def _table_of_rows(rows: Sequence[Row]) -> str:
    heads = ["variant", "tokens / parameter", "parameters", "tokens", "effective", "wall (s)"]
    heads += ["sequential", "spread", "merged", "contraction"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            row.variant,
            f"{row.tokens_per_parameter:g}",
            f"{row.parameters:,}",
            f"{row.tokens / 1e6:.2f}M",
            f"{row.effective / 1e6:.2f}M",
            f"{row.wall:.0f}",
            f"{row.sequential:.4f}",
            f"{row.spread:.4f} ({row.num_seeds} seeds)" if row.spread is not None else "",
            f"{row.merged:.4f}",
            f"{row.contraction:.3f}" if row.contraction is not None else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _table_of_comparisons(comparisons: Sequence[Comparison]) -> str:
    lines = ["| variant | tokens / parameter | at equal tokens | at equal compute | at equal time |", "|---|---|---|---|---|"]
    for one in comparisons:
        cells = ["-" if value is None else f"{value:+.4f}" for value in (one.tokens, one.effective, one.wall)]
        lines.append(f"| {one.row.variant} | {one.row.tokens_per_parameter:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _noise(rows: Sequence[Row]) -> float | None:
    """Largest spread between seeds."""
    spreads = [row.spread for row in rows if row.spread is not None]
    return max(spreads) if spreads else None


def _verdicts(comparisons: Sequence[Comparison], noise: float | None) -> list[str]:
    """A sentence for each measure of equality: how often the recurrence wins by more than the seeds differ, and by how much."""
    said = []
    margin = noise or 0.0
    beyond = f" by more than the largest spread between seeds ({margin:.4f})" if noise else ""
    for key, words in (("tokens", "tokens"), ("effective", "effective compute"), ("wall", "wall time")):
        values = [(value, one.row) for one in comparisons if (value := getattr(one, key)) is not None]
        if not values:
            continue
        wins = sum(value < -margin for value, _ in values)
        losses = sum(value > margin for value, _ in values)
        best, row = min(values, key=lambda pair: pair[0])
        said.append(
            f"At equal {words} the recurrence wins {wins} and loses {losses} of {len(values)} comparisons{beyond}; the best is "
            f"{row.variant} at {row.tokens_per_parameter:g} tokens per parameter, {best:+.4f}."
        )
    return said
