"""The results of `evaluation.py` as pictures: loss by position, residual by pass, gates and scales by layer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def require() -> None:
    """ValueError unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'lrt-server[bench]'")


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures into `folder`; returns their paths. Those of the recurrence are left out for a plain model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"positions": _positions, "gates": _gates}
    if results["residuals"]:
        pictures["passes"] = _passes
    paths = []
    for name, fill in pictures.items():
        picture, panel = pyplot.subplots(figsize=(6, 4))
        fill(panel, results)
        panel.grid(visible=True, alpha=0.3)
        picture.tight_layout()
        paths.append(folder / f"{name}.png")
        picture.savefig(paths[-1], dpi=120)
        pyplot.close(picture)
    return paths


def _positions(panel: Axes, results: dict[str, Any]) -> None:
    buckets = results["positions"]
    panel.step([one["start"] + 1 for one in buckets], [one["loss"] for one in buckets], where="post", marker="o")
    panel.set(xlabel="position in the row (from 1)", ylabel="loss, nats per token", xscale="log")


def _passes(panel: Axes, results: dict[str, Any]) -> None:
    residuals = results["residuals"]
    panel.plot(range(1, len(residuals) + 1), residuals, marker="o")
    panel.set(xlabel="pass", ylabel="largest relative change of a memory", yscale="log")


def _gates(panel: Axes, results: dict[str, Any]) -> None:
    layers = results["layers"]
    for key in sorted({key for layer in layers for key in layer} - {"layer"}):
        own = [layer for layer in layers if key in layer]
        values = [layer[key]["mean"] if isinstance(layer[key], dict) else layer[key] for layer in own]
        panel.plot([layer["layer"] for layer in own], values, marker="o", markersize=3, label=key)
    panel.set(xlabel="layer", ylabel="mean")
    panel.legend(fontsize=7)
