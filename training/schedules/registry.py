"""Every schedule of this folder by its name, with the options that a run may set.

A schedule's options are its keyword parameters annotated `Annotated[type, "what it is"]`, with a default whose type is int,
bool, float or a tuple of floats. Neighbours: `flags.py` makes flags of them, `training/config.py` binds them.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import training.schedules
from lrt_core.model import LatentRecurrentTransformer
from training.schedules import Schedule

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """One setting of a schedule; a tuple as default stands for any number of floats."""

    name: str
    default: int | bool | float | tuple[float, ...]
    help: str

    def read(self, value: object) -> object:
        """The value as the schedule takes it (JSON makes lists of tuples); ValueError when it has another type."""
        kind = type(self.default)
        if kind is tuple and isinstance(value, list | tuple) and all(type(one) in (int, float) for one in value):
            return tuple(float(one) for one in value)
        if type(value) is kind or (kind is float and type(value) is int):
            return value
        wanted = "a list of numbers" if kind is tuple else f"of type {kind.__name__}"
        raise ValueError(f"{self.name} must be {wanted}, got {value!r}")


@dataclass(frozen=True)
class Entry:
    """One schedule: its function, whether it trains recurrent models, its options by name, a step's cost in forwards, and
    whether it does the same with every batch."""

    name: str
    function: Callable[..., Any]
    is_recurrent: bool
    options: dict[str, Option]
    cost: Callable[..., float]
    is_fixed: bool


_FOUND: dict[str, Entry] = {}


def schedule(*, recurrent: bool, cost: Callable[..., float], fixed: bool = False) -> Callable[[F], F]:
    """Mark a function as the schedule of its file.

    recurrent: whether it trains recurrent models or plain ones. cost: of a step, in forwards of the whole sequence, as a
    function of the options, which it gets by name. fixed: whether it does the same with every batch of a shape: draws nothing,
    counts nothing and asks nothing of the batch's numbers. Then CUDA may record a step once and replay it.
    """

    def mark(function: F) -> F:
        _FOUND[function.__name__] = Entry(function.__name__, function, recurrent, _options(function), cost, fixed)
        return function

    return mark


def _options(function: Callable[..., Any]) -> dict[str, Option]:
    hints = get_type_hints(function, include_extras=True)
    annotated = {name: hint for name, hint in hints.items() if get_origin(hint) is Annotated}
    parameters = inspect.signature(function).parameters
    return {name: Option(name, parameters[name].default, get_args(hint)[1]) for name, hint in annotated.items()}


@cache
def entries() -> dict[str, Entry]:
    """All schedules by name."""
    for module in pkgutil.iter_modules(training.schedules.__path__, "training.schedules."):
        import_module(module.name)
    return dict(sorted(_FOUND.items()))


def entry(name: str) -> Entry:
    """ValueError when there is no schedule of that name."""
    if name not in entries():
        raise ValueError(f"schedule must be one of {', '.join(entries())}, got {name!r}")
    return entries()[name]


def bind(name: str, options: Mapping[str, object]) -> Schedule:
    """The schedule's function with options set; ValueError names a schedule or option that does not exist or a bad value."""
    found = entry(name)
    unknown = sorted(set(options) - set(found.options))
    if unknown:
        known = ", ".join(found.options) or "none"
        raise ValueError(f"{unknown[0]} is no option of the schedule {name} (its options: {known})")
    values = {key: found.options[key].read(value) for key, value in options.items()}
    return partial(found.function, **values) if values else found.function


def cost(name: str, options: Mapping[str, object]) -> float:
    """Forwards of the whole sequence in a step: 1 baseline, about 2 interleaved, K + 1 multi_refine. ValueError as `bind`."""
    bind(name, options)
    found = entry(name)
    defaults = {key: option.default for key, option in found.options.items()}
    return found.cost(**{**defaults, **options})


def check_model(model: LatentRecurrentTransformer, name: str) -> None:
    """ValueError unless the model has the recurrence that the schedule trains, or lacks the one that it does not."""
    if (model.config.recurrence is not None) == entry(name).is_recurrent:
        return
    if entry(name).is_recurrent:
        raise ValueError(f"the {name} schedule trains recurrent models; use baseline for this one")
    raise ValueError(f"the {name} schedule trains models without recurrence; use interleaved for this one")
