"""A study's pictures: bits per byte against effective compute and against wall time. Neighbours: `table.py`, `report.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.study.plan import BASELINE
from training.study.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_MARKS = "os^vDP*X<>ph"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write compute.png, and time.png with a panel for every device; returns their paths."""
    times = [measure for measure in rows[0].costs if measure.startswith("time")]
    paths = [_draw(rows, folder / "compute.png", ["compute"])]
    return [*paths, _draw(rows, folder / "time.png", times)] if times else paths


def _draw(rows: Sequence[Row], path: Path, measures: Sequence[str]) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, panels = pyplot.subplots(1, len(measures), figsize=(9 * len(measures), 6), squeeze=False)
    for panel, measure in zip(panels[0], measures, strict=True):
        _fill(panel, [row for row in rows if measure in row.costs], measure)
    panels[0][0].legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(path, dpi=110)
    pyplot.close(picture)
    return path


def _fill(panel: Axes, rows: Sequence[Row], measure: str) -> None:
    for index, variant in enumerate(dict.fromkeys(row.variant for row in rows)):
        own = [row for row in rows if row.variant == variant]
        style: dict[str, Any] = {"color": "black", "linewidth": 2.0} if variant == BASELINE else {"linewidth": 1.0}
        panel.errorbar(
            [row.costs[measure] for row in own],
            [row.sequential for row in own],
            yerr=[(row.spread or 0.0) / 2 for row in own],
            marker=_MARKS[index % len(_MARKS)],
            markersize=5,
            label=variant,
            **style,
        )
    label = f"{measure}, s" if measure.startswith("time") else "tokens, each counted once for every forward"
    panel.set(xlabel=label, ylabel="sequential bits per byte", xscale="log")
    panel.grid(visible=True, which="both", alpha=0.3)
