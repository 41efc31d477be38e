"""Everything that fixes a training run, frozen and validated, and the presets.

A run stores its TrainingConfig as `config.json`, so that resuming needs nothing but the run's folder. Neighbours:
`trainer.py` runs it, `__main__.py` builds it from the command line.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from lrt_core.config import ModelConfig, RecurrenceConfig
from training.guards import GuardConfig
from training.schedules import Schedule
from training.schedules.registry import bind, entry

Precision = Literal["auto", "float32", "bfloat16"]

PYTHON_SOURCES = "python-sources"
"""The corpus that every machine with this program has: the running interpreter's own Python files."""
PYTHON_LIBRARY = "python-library"
"""Of these, the standard library alone."""


class TrainingConfigError(ValueError):
    """A run that cannot be; the message names the setting."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise TrainingConfigError(message)


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates per kind of weight, for hidden size 768; all but the matrices' grow with (hidden_size / 768)^-0.5.

    matrix_lr: attention, MLP and memory projections (Muon). embedding_lr: token and value embeddings. gate_lr: the gates'
    small matrices. scale_lr: embedding_scale and memory_scale; residual_scale takes a hundredth of it. lr_scale: a factor on
    all of them, which a run may change when it is resumed.
    """

    matrix_lr: float = 0.03
    embedding_lr: float = 0.2
    head_lr: float = 0.004
    gate_lr: float = 0.004
    scale_lr: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            _require(isinstance(value, (int, float)) and value >= 0, f"optimizer.{one.name} must be at least 0, got {value!r}")
        for name in ("clip_norm", "lr_scale"):
            _require(0 < getattr(self, name) < math.inf, f"optimizer.{name} must be above 0, got {getattr(self, name)}")

    def scaled(self, factor: float) -> OptimizerConfig:
        """The same with every learning rate times `factor`, which is above 0."""
        _require(0 < factor < math.inf, f"learning rates must be scaled by more than 0, got {factor!r}")
        rates = {one.name: getattr(self, one.name) * factor for one in fields(self) if one.name.endswith("_lr")}
        return replace(self, **rates)


_COUNTS = ("batch_size", "num_steps", "eval_every", "eval_rows", "save_every", "keep_last", "accumulate", "log_every")


@dataclass(frozen=True)
class TrainingConfig:
    """One run.

    model: its vocab_size is the tokenizer's target; a corpus too small for it gives a smaller vocabulary.
    schedule, schedule_options: see `training/schedules`; an option that is not given has its default.
    data: `python-sources`, `python-library` or paths of files and folders.
    num_steps: optimizer steps; time_budget: seconds after which the run is over even with steps left, None for no limit. The
    learning rate follows whichever of the two is nearer its end: it rises over the first `warmup` of the run, stays, and
    falls to zero over the last `warmdown`.
    chat: data are conversations, of which the model learns what the assistant says; needs prompt_cuts of 0.
    shards: the folder of tokenised data, to share it among runs; None for one in the run's folder.
    prompt_cuts: during the warmdown, the share of likely prompt ends at which text is cut (`packing.encode_with_cuts`).
    compile: torch.compile of what a layer does beside attention. recompute: activation checkpointing: less memory, more time.
    cuda_graphs: on CUDA, in a run of one process that does not compile, launch a step's kernels all at once (`gradients.py`),
    if the schedule is fixed.
    batch_size: rows of `model.sequence_len` tokens per step; accumulate: in so many parts, one after the other, on each rank.
    eval_rows: rows of each evaluation; fill_eval_rows: with short documents where long ones give too few. *_every: in steps.
    keep_last, keep_best: which saved states stay (`state.py`).
    guard: which steps are skipped, see `guards.py`.
    """

    model: ModelConfig
    schedule: str = "interleaved"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    data: tuple[str, ...] = (PYTHON_SOURCES,)
    chat: bool = False
    shards: str | None = None
    validation_fraction: float = 0.02
    tokenizer_bytes: int = 50_000_000
    num_steps: int = 1000
    time_budget: float | None = None
    batch_size: int = 8
    warmup: float = 0.02
    warmdown: float = 0.4
    prompt_cuts: float = 0.05
    eval_every: int = 250
    eval_rows: int = 64
    fill_eval_rows: bool = True
    save_every: int = 250
    keep_last: int = 2
    keep_best: bool = False
    accumulate: int = 1
    log_every: int = 10
    seed: int = 0
    precision: Precision = "auto"
    compile: bool = False
    recompute: bool = False
    cuda_graphs: bool = True
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            _require(type(value) is int and value >= 1, f"{name} must be an integer of at least 1, got {value!r}")
        _require(
            self.precision in get_args(Precision), f"precision must be one of {get_args(Precision)}, got {self.precision!r}"
        )
        _require(
            self.batch_size % self.accumulate == 0,
            f"accumulate: a batch of {self.batch_size} rows cannot be cut into {self.accumulate} equal parts",
        )
        for name in ("chat", "compile", "recompute", "cuda_graphs", "keep_best", "fill_eval_rows"):
            _require(type(getattr(self, name)) is bool, f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("warmup", "warmdown", "prompt_cuts"):
            _require(0 <= getattr(self, name) <= 1, f"{name} is a fraction, got {getattr(self, name)!r}")
        _require(0 < self.validation_fraction < 1, f"validation_fraction must lie in 0..1, got {self.validation_fraction!r}")
        _require(self.time_budget is None or self.time_budget > 0, f"time_budget must be above 0, got {self.time_budget!r}")
        _require(not (self.chat and self.prompt_cuts), f"prompt_cuts must be 0 for conversations, got {self.prompt_cuts!r}")
        _require(bool(self.data), "data must name at least one corpus, file or folder")
        self._check_schedule()

    def _check_schedule(self) -> None:
        try:
            bind(self.schedule, self.schedule_options)
        except ValueError as error:
            raise TrainingConfigError(str(error)) from None
        recurrent = self.model.recurrence is not None
        _require(
            recurrent == entry(self.schedule).is_recurrent,
            f"schedule {self.schedule} {'needs a model without' if recurrent else 'needs a model with'} recurrence",
        )

    @property
    def piece_characters(self) -> int:
        """Length to which training documents are cut: two or three rows of ordinary text."""
        return 8 * self.model.sequence_len

    def make_schedule(self) -> Schedule:
        """The schedule's function with its options bound."""
        return bind(self.schedule, self.schedule_options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainingConfig:
        """The inverse of `to_dict`; an unknown or missing key is a TrainingConfigError that names it.

        Keys that there were not from the beginning may be missing: see `_LATER`.
        """
        values = _complete(cls, "run", data)
        values["model"] = ModelConfig.from_dict(data["model"])
        values["optimizer"] = OptimizerConfig(**_complete(OptimizerConfig, "optimizer", data["optimizer"]))
        values["guard"] = GuardConfig(**_complete(GuardConfig, "guard", data["guard"]))
        values["data"] = tuple(data["data"])
        return cls(**values)


_LATER: dict[str, dict[str, Any]] = {
    "run": {"fill_eval_rows": False, "cuda_graphs": False},
    "optimizer": {},
    "guard": {"skip_factor": GuardConfig.skip_factor},
}
"""What a run that was stored before there were these settings goes on with."""


def completed(data: dict[str, Any]) -> dict[str, Any]:
    """Stored settings, together with those that came later."""
    return {**_LATER["run"], **data, "guard": {**_LATER["guard"], **data.get("guard", {})}}


def _complete(
    cls: type[TrainingConfig] | type[OptimizerConfig] | type[GuardConfig], owner: str, data: dict[str, Any]
) -> dict[str, Any]:
    """The values of every field."""
    known, values = {one.name for one in fields(cls)}, {**_LATER[owner], **data}
    unknown, missing = sorted(set(values) - known), sorted(known - set(values))
    _require(not unknown, f"unknown {owner} setting(s): {', '.join(unknown)}")
    _require(not missing, f"missing {owner} setting(s): {', '.join(missing)}")
    return values


PRESETS = {
    "tiny": TrainingConfig(
        model=ModelConfig(
            vocab_size=384,
            sequence_len=64,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            hidden_size=32,
            gate_channels=16,
            recurrence=RecurrenceConfig(source_layer=1),
        ),
        data=(PYTHON_LIBRARY,),
        tokenizer_bytes=500_000,
        num_steps=30,
        batch_size=4,
        prompt_cuts=0.0,
        eval_every=15,
        eval_rows=4,
        save_every=15,
        log_every=5,
    ),
    "small": TrainingConfig(
        model=ModelConfig(
            vocab_size=2048,
            sequence_len=512,
            num_layers=5,
            num_heads=4,
            num_kv_heads=2,
            hidden_size=256,
            recurrence=RecurrenceConfig(source_layer=3),
        ),
        num_steps=3200,
        batch_size=8,
        save_every=100,
    ),
}
"""`tiny` runs in seconds (tests, first try); `small` takes two hours of two CPU cores, and with longer and larger batches, on a
GPU, made the bundled checkpoint."""
