"""The command line's `--schedule` and, for every option of every schedule, a flag. Neighbour: `registry.py`.

An option that several schedules share is one flag.
"""

from __future__ import annotations

import argparse
from typing import Any

from training.schedules.registry import Option, entries, entry


def add_schedule_flags(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Add the flags; those not given are None, `--schedule` is `default`."""
    parser.add_argument("--schedule", choices=tuple(entries()), default=default, help="how a training step makes its forwards")
    for name, (option, owners) in _shared().items():
        flag, text = f"--{name.replace('_', '-')}", f"{option.help}; of {', '.join(owners)}"
        if isinstance(option.default, bool):
            parser.add_argument(flag, action="store_true", default=None, help=text)
        elif isinstance(option.default, tuple):
            parser.add_argument(flag, type=_numbers, metavar="X,X,...", help=text)
        else:
            parser.add_argument(flag, type=type(option.default), metavar="N", help=f"{text} (default: {option.default})")


def option_names() -> list[str]:
    """Every option of every schedule."""
    return list(_shared())


def given_options(options: argparse.Namespace, schedule: str) -> dict[str, Any]:
    """The options that the command line sets; ValueError for one that `schedule` does not have."""
    given = {name: getattr(options, name) for name in option_names() if getattr(options, name) is not None}
    for name in given:
        if name not in entry(schedule).options:
            owners = " and ".join(_shared()[name][1])
            raise ValueError(f"--{name.replace('_', '-')} is an option of {owners}, not of {schedule}")
    return given


def _shared() -> dict[str, tuple[Option, list[str]]]:
    """Options by name, each with the schedules that have it."""
    shared: dict[str, tuple[Option, list[str]]] = {}
    for found in entries().values():
        for option in found.options.values():
            shared.setdefault(option.name, (option, []))[1].append(found.name)
    return shared


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from None
