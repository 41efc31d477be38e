"""What the commands of this package share: a type of argument, and how they end: with a status and a line that says why.

Neighbours: `evaluation.py` and `bench.py` run so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def status_of(name: str, work: Callable[[], None]) -> int:
    """Run `work`; returns the exit status: 0, 1 where something is wrong or cannot be written, 130 after Ctrl-C."""
    try:
        work()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    return 0


def positive(text: str) -> int:
    """An argument: an integer of at least 1."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)
