"""A study's pictures: bits per byte against effective compute and against wall time. Neighbour: `report.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.study.plan import BASELINE

if TYPE_CHECKING:
    from training.study.report import Row

_MARKS = "os^vDP*X<>ph"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write compute.png and time.png; returns their paths."""
    return [
        _draw(rows, folder / "compute.png", "effective", "effective tokens (a token counts once for every forward)"),
        _draw(rows, folder / "time.png", "wall", "seconds of training, each step as fast as alone"),
    ]


def _draw(rows: Sequence[Row], path: Path, key: str, label: str) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, panel = pyplot.subplots(figsize=(9, 6))
    for index, variant in enumerate(dict.fromkeys(row.variant for row in rows)):
        own = [row for row in rows if row.variant == variant]
        style = {"color": "black", "linewidth": 2.0} if variant == BASELINE else {"linewidth": 1.0}
        panel.errorbar(
            [getattr(row, key) for row in own],
            [row.sequential for row in own],
            yerr=[(row.spread or 0.0) / 2 for row in own],
            marker=_MARKS[index % len(_MARKS)],
            markersize=5,
            label=variant,
            **style,
        )
    panel.set(xlabel=label, ylabel="sequential bits per byte", xscale="log")
    panel.grid(visible=True, which="both", alpha=0.3)
    panel.legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(path, dpi=110)
    pyplot.close(picture)
    return path
