"""Which runs make up a study: variants times budgets times seeds, as plain data.

A *cell* is one run. Budgets are stated in tokens per parameter of the plain model, so that every variant sees the same text at
a budget; *effective* tokens count a token once for every forward that a training step computes it in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lrt_core.config import ModelConfig, RecurrenceConfig
from lrt_core.model import LatentRecurrentTransformer
from training.config import PRESETS, TrainingConfig
from training.schedules.registry import cost

BASELINE = "baseline"


class StudyError(ValueError):
    """A study that cannot be, or does not fit what lies in its folder; the message says what to do."""


@dataclass(frozen=True)
class Variant:
    """One way to build and train the model.

    budgets: tokens per parameter, ascending. num_seeds: how many runs, alike but for their seeds, there are of each.
    """

    name: str
    budgets: tuple[float, ...]
    recurrence: RecurrenceConfig | None = None
    schedule: str = BASELINE
    schedule_options: dict[str, Any] = field(default_factory=dict)
    num_seeds: int = 1

    @property
    def cost(self) -> float:
        """Forwards of the whole sequence in a training step."""
        return cost(self.schedule, self.schedule_options)


@dataclass(frozen=True)
class Cell:
    """One run of the study; `name` is also its folder."""

    variant: Variant
    tokens_per_parameter: float
    seed: int

    @property
    def name(self) -> str:
        """Variant, budget and seed in letters that every file system takes."""
        return f"{self.variant.name}_{self.tokens_per_parameter:g}_{self.seed}"


@dataclass(frozen=True)
class Plan:
    """base: the plain model and everything that the runs share; its num_steps and schedule are each cell's own."""

    name: str
    base: TrainingConfig
    variants: tuple[Variant, ...]

    def num_parameters(self, vocab_size: int) -> int:
        """Of the plain model with that vocabulary; what budgets are stated for."""
        with torch.device("meta"):
            model = LatentRecurrentTransformer(replace(self.base.model, vocab_size=vocab_size))
        return sum(parameter.numel() for parameter in model.parameters())

    def cells(self) -> list[Cell]:
        """The runs, those of the first seed first, and of them the smallest budgets: cut short, a study has whole budgets."""
        cells = [
            Cell(variant, budget, seed)
            for variant in self.variants
            for budget in variant.budgets
            for seed in range(self.base.seed, self.base.seed + variant.num_seeds)
        ]
        return sorted(cells, key=lambda cell: (cell.seed, cell.tokens_per_parameter))

    def config(self, cell: Cell, vocab_size: int) -> TrainingConfig:
        """The run of a cell."""
        variant = cell.variant
        tokens_per_step = self.base.batch_size * self.base.model.sequence_len
        num_steps = max(1, round(cell.tokens_per_parameter * self.num_parameters(vocab_size) / tokens_per_step))
        return replace(
            self.base,
            model=replace(self.base.model, vocab_size=vocab_size, recurrence=variant.recurrence),
            schedule=variant.schedule,
            schedule_options=variant.schedule_options,
            num_steps=num_steps,
            seed=cell.seed,
        )


def chosen(
    plan: Plan, variants: Sequence[str] | None = None, budgets: Sequence[float] | None = None, num_seeds: int | None = None
) -> Plan:
    """The plan with these variants alone, these budgets in place of its own and so many seeds of everything.

    StudyError for a variant that it does not have or numbers that are not above zero.
    """
    known = {variant.name: variant for variant in plan.variants}
    unknown = [name for name in variants or () if name not in known]
    if unknown:
        raise StudyError(f"there is no variant {unknown[0]!r}; this plan has {', '.join(known)}")
    found = list(plan.variants) if variants is None else [known[name] for name in variants]
    if budgets is not None:
        if not budgets or min(budgets) <= 0:
            raise StudyError(f"budgets must be above 0, got {list(budgets)}")
        found = [replace(variant, budgets=tuple(sorted(set(budgets)))) for variant in found]
    if num_seeds is not None:
        if num_seeds < 1:
            raise StudyError(f"there must be at least one seed, got {num_seeds}")
        found = [replace(variant, num_seeds=num_seeds) for variant in found]
    return replace(plan, variants=tuple(found))


def _matrix(num_layers: int, budgets: tuple[float, ...], longer: tuple[float, ...], num_seeds: int) -> tuple[Variant, ...]:
    """The paper's choices one by one: plain, schedules, projections, source layer, pathways.

    longer: budgets of the plain model beyond the common ones, so that it is there at the others' effective compute too.
    """
    last, upper = num_layers - 1, num_layers // 2
    layerwise = RecurrenceConfig(last)
    shared = RecurrenceConfig(last, "shared")
    two_subsets, two_refinements = {"num_subsets": 2}, {"num_refinements": 2}

    def interleaved(name: str, recurrence: RecurrenceConfig, seeds: int = 1, **options: object) -> Variant:
        return Variant(f"interleaved-{name}", budgets, recurrence, "interleaved", {**two_subsets, **options}, seeds)

    def refined(name: str, recurrence: RecurrenceConfig, seeds: int = 1) -> Variant:
        return Variant(f"refined-{name}", budgets, recurrence, "multi_refine", two_refinements, seeds)

    return (
        Variant(BASELINE, budgets + longer, num_seeds=num_seeds),
        interleaved("layerwise-last", layerwise, num_seeds),
        interleaved("shared-last", shared, num_seeds),
        interleaved("layerwise-upper", replace(layerwise, source_layer=upper), num_seeds),
        interleaved("shared-upper", replace(shared, source_layer=upper)),
        interleaved("injection-only", replace(layerwise, kv_projection=False)),
        interleaved("projection-only", replace(layerwise, residual_injection=False)),
        interleaved("refresh", layerwise, kv_refresh=True),
        refined("layerwise-last", layerwise, num_seeds),
        refined("shared-last", shared),
        refined("layerwise-upper", replace(layerwise, source_layer=upper)),
        Variant("chunked", budgets, layerwise, "chunked", {"chunk_len": 32}),
    )


def _matrix_plan(name: str, model: ModelConfig, changes: dict[str, Any], variants: tuple[Variant, ...]) -> Plan:
    """The variants on a plain model; changes: of the training's own settings."""
    base = TrainingConfig(model=model, schedule=BASELINE, prompt_cuts=0.0, eval_every=1_000_000, precision="float32", **changes)
    return Plan(name, base, variants)


def _laptop() -> Plan:
    model = _square(vocab_size=512, num_layers=4, num_heads=2)
    budgets = (2.5, 5.0, 10.0), (20.0, 30.0)
    return _matrix_plan("laptop", model, {**_SETTINGS, "batch_size": 16}, _matrix(model.num_layers, *budgets, num_seeds=2))


def _million() -> Plan:
    model = _square(vocab_size=1024, num_layers=6, num_heads=3)
    budgets = (5.0, 10.0, 20.0), (40.0, 60.0)
    return _matrix_plan("million", model, {**_SETTINGS, "batch_size": 32}, _matrix(model.num_layers, *budgets, num_seeds=2))


_SETTINGS = {"eval_rows": 256, "save_every": 500, "log_every": 50}


def _square(vocab_size: int, num_layers: int, num_heads: int) -> ModelConfig:
    """A plain model of heads of 32 channels that reads 256 tokens."""
    return ModelConfig(
        vocab_size=vocab_size,
        sequence_len=256,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        hidden_size=32 * num_heads,
        value_embeddings="alternating",
    )


def _tiny() -> Plan:
    model = replace(PRESETS["tiny"].model, sequence_len=32, value_embeddings="alternating", recurrence=None)
    changes = {"tokenizer_bytes": 500_000, "batch_size": 4, "eval_rows": 8, "save_every": 5, "log_every": 1}
    return _matrix_plan("tiny", model, changes, _matrix(model.num_layers, (0.01, 0.02, 0.04), (0.08, 0.12), num_seeds=1))


def _small() -> Plan:
    preset = PRESETS["small"]
    last = preset.model.num_layers - 1
    base = replace(
        preset,
        model=replace(preset.model, value_embeddings="alternating", recurrence=None),
        schedule=BASELINE,
        batch_size=64,
        eval_rows=128,
        eval_every=1_000_000,
        save_every=500,
        log_every=50,
    )

    def interleaved(name: str, budgets: tuple[float, ...], recurrence: RecurrenceConfig) -> Variant:
        return Variant(f"interleaved-{name}", budgets, recurrence, "interleaved", {"num_subsets": 2})

    return Plan(
        "small",
        base,
        (
            Variant(BASELINE, (8.0, 16.0)),
            interleaved("layerwise-last", (8.0,), RecurrenceConfig(last)),
            interleaved("shared-last", (8.0,), RecurrenceConfig(last, "shared")),
            interleaved("layerwise-upper", (8.0,), RecurrenceConfig(last - 1)),
        ),
    )


PLANS = {"laptop": _laptop, "million": _million, "small": _small, "tiny": _tiny}
"""`laptop`: a third of a million parameters, some hours on two cores. `million`: about a million parameters, for a GPU.
`small`: the bundled checkpoint's shape, a few variants; for a GPU. `tiny`: minutes at most, shows that it works."""
