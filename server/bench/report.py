"""What was measured: figures with their spread, a line of the table each, and all of them as JSON. No torch.

Neighbours: `repeat.py` makes the samples, `__main__.py` writes the report, also one that was cut short.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.bench.errors import BenchError


@dataclass(frozen=True)
class Figure:
    """One measured quantity: a sample per repetition, in `unit`. details: what else JSON says; remark: what else the table
    says."""

    name: str
    unit: str
    samples: Sequence[float]
    details: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""

    @property
    def median(self) -> float:
        """The figure itself."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """Smallest sample."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """Largest sample."""
        return max(self.samples)

    def row(self) -> str:
        """A line of the table."""
        spread = f"({_number(self.low)} to {_number(self.high)})"
        line = f"{self.name:<46} {_number(self.median):>9} {self.unit:<6} {spread:<22} {self.remark}"
        return "\n".join(part.rstrip() for part in line.splitlines())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = {"name": self.name, "unit": self.unit, "median": self.median, "low": self.low, "high": self.high}
        return {**values, "samples": list(self.samples), **self.details}


@dataclass
class Report:
    """Everything a run has to say; `head` holds the mode, the arguments and the machine's limits."""

    head: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Print a line that belongs to the run as a whole, and keep it."""
        self.notes.append(line)
        print(line, flush=True)

    def add(self, figure: Figure) -> None:
        """Print a figure and keep it."""
        self.figures.append(figure)
        print(figure.row(), flush=True)

    def write(self, path: Path, interrupted: bool) -> None:
        """Write it all as JSON. Raises BenchError when the file cannot be written."""
        figures = [figure.to_dict() for figure in self.figures]
        data = {**self.head, "interrupted": interrupted, "notes": self.notes, "figures": figures}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise BenchError(f"cannot write {path}: {error.strerror or error}") from None


def ratios(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    """Ours over others, repetition by repetition: what drifts between repetitions drops out."""
    return [one / other for one, other in zip(ours, others, strict=True)]


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99 (nearest rank); None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{percent}": ordered[max(0, -(-percent * len(ordered) // 100) - 1)] for percent in (50, 95, 99)}


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
