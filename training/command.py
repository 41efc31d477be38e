"""How a command of this package ends: with a status and, where it could not go on, a line that says why.

Neighbours: `evaluation.py` and `bench.py` run so.
"""

from __future__ import annotations

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
