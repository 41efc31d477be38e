"""What the commands of this package share: arguments, and how they end: with a status and a line that says why.

Neighbours: `evaluation.py` and `bench.py` run so; `__main__.py` takes the device from here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch


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


def device_of(name: str) -> torch.device:
    """The device of a `--device` flag; ValueError where there is none of that name."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such kind of device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device can be used here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device
