"""The figures of `growth.py` as pictures: measured times as points, what the machine's limits allow as bands."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.bench.errors import BenchError
from server.bench.report import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture


def require() -> None:
    """Raise BenchError unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("plots need matplotlib: pip install 'lrt-server[bench]'")


def decode(figures: Sequence[Figure], path: Path) -> Path:
    """Step time against batch, a line for every context; a panel for every model."""
    models = _values(figures, "model")
    picture, panels = _panels(len(models), "sequences in a step", "time of a step, ms")
    for panel, model in zip(panels, models, strict=True):
        panel.set_title(str(model))
        own = [figure for figure in figures if figure.details["model"] == model]
        for context in _values(own, "context"):
            line = [figure for figure in own if figure.details["context"] == context]
            _line(panel, line, "batch", f"context {context}")
        panel.legend()
    return _save(picture, path)


def prompts(figures: Sequence[Figure], path: Path) -> Path:
    """Time to read a prompt against its length, a line for every model."""
    picture, panels = _panels(1, "tokens of the prompt", "time until the first token, ms")
    for model in _values(figures, "model"):
        _line(panels[0], [figure for figure in figures if figure.details["model"] == model], "prompt_len", str(model))
    panels[0].legend()
    return _save(picture, path)


def _values(figures: Sequence[Figure], key: str) -> list[object]:
    return list(dict.fromkeys(figure.details[key] for figure in figures))


def _line(panel: Axes, figures: Sequence[Figure], key: str, label: str) -> None:
    """Medians with their spread, and beside them the band from full overlap of reading and computing to none."""
    x = [figure.details[key] for figure in figures]
    medians = [figure.median for figure in figures]
    spread = [[figure.median - figure.low for figure in figures], [figure.high - figure.median for figure in figures]]
    bars = panel.errorbar(x, medians, yerr=spread, marker="o", markersize=3, capsize=2, label=label)
    color = bars.lines[0].get_color()
    low, high = zip(*(figure.details["expected_ms"] for figure in figures), strict=True)
    panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    panel.plot(x, low, color=color, linestyle="dotted", linewidth=1)


def _panels(number: int, x: str, y: str) -> tuple[Picture, list[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import StrMethodFormatter

    picture, grid = pyplot.subplots(1, max(1, number), figsize=(6 * max(1, number), 4.5), squeeze=False, sharey=True)
    for panel in grid[0]:
        panel.set(xlabel=x, yscale="log")
        panel.set_xscale("log", base=2)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.grid(visible=True, which="both", alpha=0.3)
    grid[0][0].set_ylabel(y)
    return picture, list(grid[0])


def _save(picture: Picture, path: Path) -> Path:
    """Raises BenchError when the file cannot be written."""
    picture.text(0.01, 0.005, "bands and dotted lines: what the machine's read bandwidth and matrix rate allow", fontsize=7)
    picture.tight_layout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, dpi=120)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror or error}") from None
    return path
