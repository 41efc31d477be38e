"""Which steps of a run are skipped, and when a run must end: losses and gradients that are not finite, or explode.

The rule, over the last `skip_window` accepted steps, from the `MIN_HISTORY`th on:
a loss explodes when it lies above their mean by more than `skip_deviations` standard deviations and by more than `skip_nats`;
a gradient norm when it lies above their mean by more than `skip_deviations` standard deviations, is more than `skip_ratio`
times the mean, and is clipped (below that a step is no larger than any). All parts must hold: the first alone would stop a
quiet run at its first hard text, the second alone a noisy one. Levels that rise with the loss would never see a slow ascent,
so a loss also explodes above `skip_factor` times the lowest mean that there was, and `skip_nats`. A run ends when more than
`max_skipped` of its last `skip_window` steps, in a row or not, were skipped.

The guard sees plain numbers. Where several processes train one model they must agree, so each must be told the same numbers
(the loss averaged over all, the norm of the whole gradient). Neighbour: `trainer.py`, which asks before every optimizer step.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

MIN_HISTORY = 16
"""Accepted steps before levels mean anything: losses fall and norms move fast at the start of a run."""


@dataclass(frozen=True)
class GuardConfig:
    """The module's rule in numbers; ValueError names a bad one.

    `skip_deviations` 0 switches the levels off: then only what is not finite is skipped. `skip_factor` 0 leaves out its part.
    """

    skip_window: int = 100
    skip_deviations: float = 6.0
    skip_nats: float = 1.0
    skip_ratio: float = 10.0
    skip_factor: float = 2.0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        for name, lowest in (("skip_window", MIN_HISTORY), ("max_skipped", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
        for name in ("skip_deviations", "skip_nats", "skip_ratio", "skip_factor"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if 0 < self.skip_factor < 1:
            raise ValueError(f"skip_factor must be 0 or at least 1, got {self.skip_factor!r}")
        if self.max_skipped >= self.skip_window:
            raise ValueError(f"max_skipped must lie below skip_window, which is {self.skip_window}, got {self.max_skipped}")


_HELP = {
    "skip_window": ("N", "accepted steps that a step's loss and gradient norm are compared with"),
    "skip_deviations": ("K", "skip a step above their mean by more than K standard deviations; 0: only what is not finite"),
    "skip_nats": ("X", "and whose loss is above their mean by more than X"),
    "skip_ratio": ("X", "or whose gradient norm is clipped and more than X times their mean"),
    "skip_factor": ("X", "or whose loss is above X times the lowest mean so far, and --skip-nats; 0: leave this out"),
    "max_skipped": ("M", "end the run when more than M of the last N steps were skipped"),
}


def add_guard_flags(parser: argparse._ActionsContainer) -> None:
    """A flag for every field of `GuardConfig`; those not given are None."""
    for one in fields(GuardConfig):
        metavar, text = _HELP[one.name]
        flag, kind = f"--{one.name.replace('_', '-')}", type(one.default)
        parser.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: {one.default:g})")


class Level(NamedTuple):
    """Mean and standard deviation of the accepted steps' values."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Collection[float]) -> Level:
        """Of at least one value; the sums are exact, so they do not depend on how the history came about."""
        mean = math.fsum(values) / len(values)
        return cls(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.deviation:.2g}"


class Guard:
    """The running levels of one run. `judge` decides on a step, `record` takes the decision in.

    clip_norm: what gradients are clipped to; a smaller norm does not explode.
    """

    def __init__(self, config: GuardConfig, clip_norm: float = 0.0) -> None:
        self.config, self.clip_norm = config, clip_norm
        self.num_skipped = 0
        """Over the whole run."""
        window = config.skip_window
        self._losses, self._norms = deque[float](maxlen=window), deque[float](maxlen=window)
        self._skips = deque[bool](maxlen=window)
        self._lowest: float | None = None
        """Of the means of losses, each over at least MIN_HISTORY steps."""

    def judge(self, loss: float, grad_norm: float) -> str:
        """Why a step of this loss (nats per token) and gradient norm (before clipping) must be skipped; "" if it need not."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} {value} is not finite"
        config = self.config
        if config.skip_deviations == 0 or len(self._losses) < MIN_HISTORY:
            return ""
        level = Level.of(self._losses)
        if loss > level.mean + max(config.skip_deviations * level.deviation, config.skip_nats):
            return f"loss {loss:.4g} explodes ({level} over {len(self._losses)} steps)"
        lowest = math.inf if self._lowest is None else self._lowest
        if config.skip_factor > 0 and loss > config.skip_factor * lowest + config.skip_nats:
            return f"loss {loss:.4g} explodes (its mean was {lowest:.4g} before)"
        level = Level.of(self._norms)
        bounds = (level.mean + config.skip_deviations * level.deviation, config.skip_ratio * level.mean, self.clip_norm)
        if grad_norm > max(bounds):
            return f"gradient norm {grad_norm:.4g} explodes ({level} over {len(self._norms)} steps)"
        return ""

    def record(self, loss: float, grad_norm: float, skipped: bool) -> None:
        """Take in a step; the levels hold those of accepted steps alone."""
        self._skips.append(skipped)
        self.num_skipped += skipped
        if not skipped:
            self._losses.append(loss)
            self._norms.append(grad_norm)
            self._take_level()

    def _take_level(self) -> None:
        if len(self._losses) >= MIN_HISTORY:
            mean = Level.of(self._losses).mean
            self._lowest = mean if self._lowest is None else min(self._lowest, mean)

    @property
    def num_recently_skipped(self) -> int:
        """Of the last `skip_window` steps."""
        return sum(self._skips)

    @property
    def gives_up(self) -> bool:
        """Whether more steps were skipped of late than a run may skip."""
        return self.num_recently_skipped > self.config.max_skipped

    def advice(self, step: int, reason: str, saved_step: int, smaller: str) -> str:
        """What to say when the run gives up. saved_step: of the state saved last; smaller: what goes on at lower rates."""
        return (
            f"step {step}: {self.num_recently_skipped} of the last {self.config.skip_window} steps were skipped, this one "
            f"because its {reason}; the state saved at step {saved_step} is left as it was. Go on from there with smaller "
            f"learning rates: {smaller}; or, where the data is to blame, with a larger --max-skipped or with "
            "--skip-deviations 0"
        )

    def forget(self) -> None:
        """Drop the levels and the recent skips, not their count: what comes next need not look like what was."""
        for history in (self._losses, self._norms, self._skips):
            history.clear()
        self._lowest = None

    def state_dict(self) -> dict[str, Any]:
        """Plain data: numbers and lists of them."""
        lists = {"losses": list(self._losses), "norms": list(self._norms), "skips": list(self._skips)}
        return {"num_skipped": self.num_skipped, "lowest": self._lowest, **lists}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the guard that gave `state_dict`; of a history longer than the window the latest part.

        A state of before there was a lowest mean begins with the mean of its history.
        """
        self.forget()
        self.num_skipped = state["num_skipped"]
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self._skips.extend(state["skips"])
        self._lowest = state.get("lowest")
        self._take_level()
