"""A study's report of what is there so far: report.md, results.csv and, where matplotlib is, the pictures of `plots.py`.

Neighbour: `table.py` makes the figures.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from training.study.table import Comparison, Result, Row, Timing, compare, tabulate


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
        "*Tokens / parameter* are of the plain model's parameters, the same text for all; layerwise projections add some. "
        "*Compute* counts a token once for every forward in which a training step computes it, whatever a forward costs. *Time "
        "on* a device: the steps times the median step, measured there alone. Spread: largest less smallest of the seeds.",
        *([f"**{num_missing} runs of the plan are missing.**"] if num_missing else []),
        "## All runs",
        _table_of_rows(rows),
        "## Beside the plain model",
        "Sequential BPB less the plain model's at as many tokens, as much compute, as much time: below zero the recurrence "
        "wins. The plain model is interpolated between its budgets, and of the same seeds; a dash: it was not trained for so "
        "little or so long.",
        _table_of_comparisons(comparisons),
        *_verdicts(comparisons, max((row.spread for row in rows if row.spread is not None), default=0.0)),
        *(f"![{path.stem}]({path.name})" for path in pictures),
    ]
    return "\n\n".join(sections) + "\n"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def _table_of_rows(rows: Sequence[Row]) -> str:
    measures = list(rows[0].costs)
    heads = [
        "variant",
        "tokens / parameter",
        "parameters",
        "tokens / own parameter",
        *measures,
        "sequential",
        "spread",
        "merged",
        "contraction",
    ]
    return _table(heads, [_cells(row, measures) for row in rows])


def _cells(row: Row, measures: Sequence[str]) -> list[str]:
    return [
        row.variant,
        f"{row.tokens_per_parameter:g}",
        f"{row.parameters:,}",
        f"{row.costs['tokens'] / row.parameters:.2f}",
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
    for measure in dict.fromkeys(measure for one in comparisons for measure in one.differences):
        values = [(value, one.row) for one in comparisons if (value := one.differences.get(measure)) is not None]
        if not values:
            continue
        below, above = (sum(sign * value > margin for value, _ in values) for sign in (-1, 1))
        best, row = min(values, key=lambda pair: pair[0])
        found = f"the best is {row.variant} at {row.tokens_per_parameter:g} tokens per parameter, {best:+.4f}."
        if margin:
            counts = f"the recurrence wins {below} and loses {above} of {len(values)} comparisons, by more than the largest"
            said.append(f"At equal {measure} {counts} spread between seeds ({margin:.4f}); {found}")
        else:
            counts = f"the recurrence is below the plain model in {below} and above it in {above} of {len(values)} comparisons"
            said.append(f"At equal {measure} {counts}; how far seeds differ is not known; {found}")
    return said
