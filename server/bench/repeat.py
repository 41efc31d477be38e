"""Repetitions that take turns: a, b, a, b. A machine that slows down for a minute slows both. No torch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

try:
    from tqdm import tqdm
except ImportError:  # a bar is a convenience, `pip install lrt-server[bench]` brings it; without it numbers count up
    tqdm = None  # type: ignore[assignment,misc]


@dataclass(frozen=True)
class Work:
    """Something to measure: `run` returns one sample; `warm` runs once before all repetitions (`run` itself without it)."""

    name: str
    run: Callable[[], float]
    warm: Callable[[], object] | None = None


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[], object]]:
    """A bar on stderr, where that is a terminal (a count without tqdm); the block calls what it gets after every step."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    if tqdm is None:
        steps = itertools.count(1)
        yield lambda: print(f"\r{label}: {next(steps)}/{total}", end="", file=sys.stderr, flush=True)
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        return
    with tqdm(total=total, desc=label, leave=False, dynamic_ncols=True) as bar:
        yield bar.update


def interleave(works: Sequence[Work], repetitions: int, label: str) -> list[list[float]]:
    """Samples of every work: all warm up, then each repetition runs all of them in order."""
    samples: list[list[float]] = [[] for _ in works]
    with progress(len(works) * (repetitions + 1), label) as advance:
        for work in works:
            (work.warm or work.run)()
            advance()
        for _ in range(repetitions):
            for own, work in zip(samples, works, strict=True):
                own.append(work.run())
                advance()
    return samples
