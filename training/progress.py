"""What a run shows while it works: a bar on a terminal, JSON lines in a file. Neighbour: `trainer.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """Bar and log of one run; use as a context manager. The bar appears on a terminal only."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("a", encoding="utf-8")
        self._bar: tqdm[Any] = tqdm(
            total=100.0, disable=None, file=sys.stderr, bar_format="{percentage:5.1f}%|{bar:30}|{postfix}", leave=True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        self._log.close()

    def log(self, event: str, **values: Any) -> None:
        """Append one line and flush it, so that the file can be followed."""
        self._log.write(json.dumps({"event": event, **values}) + "\n")
        self._log.flush()

    def show(self, fraction: float, step: int, loss: float, bpb: float, tokens_per_second: float, seconds_left: float) -> None:
        """Move the bar to `fraction` of the run."""
        self._bar.n = round(100 * fraction, 1)
        left = tqdm.format_interval(seconds_left)
        self._bar.set_postfix_str(
            f" step {step} loss {loss:.3f} bpb {bpb:.3f} {tokens_per_second:,.0f} tok/s {left} left", refresh=True
        )

    def say(self, text: str) -> None:
        """A line for the reader, above the bar."""
        tqdm.write(text, file=sys.stderr)
