"""The command line's flags for the recurrence: which projections, which source layer, which of the two pathways.

Neighbours: `__main__.py`, `lrt_core/config.py`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import get_args

from lrt_core.config import ModelConfig, RecurrenceConfig, Variant

RECURRENCE_SETTINGS = ("recurrence", "source_layer", "no_residual_injection", "no_kv_projection")


def add_recurrence_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags; those not given are None."""
    add = parser.add_argument
    add("--recurrence", choices=get_args(Variant), help="memory projections of every layer, or one pair for all")
    add("--source-layer", type=int, metavar="N", help="the layer whose output is the latent, from 0 (default: the last)")
    add("--no-residual-injection", action="store_true", default=None, help="memory enters keys and values alone")
    add("--no-kv-projection", action="store_true", default=None, help="memory enters the residual stream alone")


def with_recurrence(model: ModelConfig, options: argparse.Namespace, schedule: str, is_recurrent: bool) -> ModelConfig:
    """The model with the recurrence that the flags ask for: none for a schedule that trains plain models.

    ValueError where a flag is given for a schedule without recurrence; ConfigError for settings that no model has.
    """
    given = [name for name in RECURRENCE_SETTINGS if getattr(options, name) is not None]
    if not is_recurrent:
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} needs a recurrent schedule, and {schedule} is not")
        return replace(model, recurrence=None)
    recurrence = model.recurrence or RecurrenceConfig(source_layer=model.num_layers - 1)
    if options.recurrence is not None:
        recurrence = replace(recurrence, variant=options.recurrence)
    if options.source_layer is not None:
        recurrence = replace(recurrence, source_layer=options.source_layer)
    if given:
        recurrence = replace(
            recurrence,
            residual_injection=recurrence.residual_injection and not options.no_residual_injection,
            kv_projection=recurrence.kv_projection and not options.no_kv_projection,
        )
    return replace(model, recurrence=recurrence)
