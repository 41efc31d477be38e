"""What a run shows while it works: a bar on a terminal, JSON lines in a file, and figures for further sinks.

Neighbours: `trainer.py` reports to it, `sinks.py` has TensorBoard and Weights & Biases.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from training.sinks import Sink

_BLOCK_BYTES = 1 << 16
_GROUPS = {"step": "train", "evaluation": "validation"}
"""Events whose numbers are figures for the sinks, and the group that they stand in there."""


class Progress:
    """Bar, log and sinks of one run that begins or goes on at `step`; use as a context manager.

    The bar appears on a terminal only. A sink that fails is named once and gets nothing more; the run goes on. OSError names
    the log where it cannot be written. A last line that a crash or a full disk cut off is removed at the start.
    """

    def __init__(self, log: Path, sinks: Sequence[Sink] = (), step: int = 0) -> None:
        _remove_torn_line(log)
        self._path, self._log = log, log.open("ab", buffering=0)  # nothing is left to be written when it is closed
        self._bar: tqdm[Any] = tqdm(
            total=100.0, disable=None, file=sys.stderr, bar_format="{percentage:5.1f}%|{bar:30}|{postfix}", leave=True
        )
        self._sinks: list[Sink] = list(sinks)
        for sink in sinks:
            self._try(sink, lambda sink: sink.open(step))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sink in list(self._sinks):
            self._try(sink, lambda sink: sink.close())
        self._bar.close()
        self._log.close()

    def log(self, event: str, **values: Any) -> None:
        """Append one line at once, so that the file can be followed; numbers that are not finite are null there.

        The numbers of steps and evaluations go to the sinks as well, as of their `step`.
        """
        line = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        data = (json.dumps({"event": event, **line}, allow_nan=False) + "\n").encode()
        try:
            while data:
                data = data[self._log.write(data) :]
        except OSError as error:
            raise OSError(f"{self._path}: cannot be written: {error.strerror}") from None
        if event in _GROUPS and self._sinks:
            step, figures = values["step"], _figures(_GROUPS[event], values)
            for sink in list(self._sinks):
                self._try(sink, lambda sink: sink.scalars(step, figures))

    def _try(self, sink: Sink, work: Callable[[Sink], None]) -> None:
        """Run `work` on the sink; should it raise, say so and do without the sink from then on."""
        try:
            work(sink)
        except Exception as error:
            self._sinks.remove(sink)
            self.log("sink_failed", sink=sink.name, error=f"{type(error).__name__}: {error}")
            self.say(f"lrt-train: warning: {sink.name} failed and is off from here on: {type(error).__name__}: {error}")

    def show(
        self,
        fraction: float,
        step: int,
        loss: float,
        bpb: float,
        tokens_per_second: float,
        seconds_left: float,
        skipped: int = 0,
    ) -> None:
        """Move the bar to `fraction` of the run; skipped: steps so far."""
        self._bar.n = round(100 * fraction, 1)
        left = tqdm.format_interval(seconds_left)
        lost = f" {skipped} skipped" if skipped else ""
        self._bar.set_postfix_str(
            f" step {step} loss {loss:.3f} bpb {bpb:.3f}{lost} {tokens_per_second:,.0f} tok/s {left} left", refresh=True
        )

    def say(self, text: str) -> None:
        """A line for the reader, above the bar."""
        tqdm.write(text, file=sys.stderr)


def _remove_torn_line(log: Path) -> None:
    if not log.is_file():
        return
    with log.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            if (found := file.read(end - start).rfind(b"\n")) >= 0:
                start += found + 1
                break
            end = start
        else:
            start = 0
        file.truncate(start)


def _figures(group: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers among the values, by the names that sinks know."""
    return {f"{group}/{key}": value for key, value in values.items() if key != "step" and type(value) in (int, float)}
