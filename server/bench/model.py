"""What is measured: the bench model d12 with random weights, or a checkpoint; and the one place where it becomes what serves.

A random recurrence need not contract. Gamma and the memory projections are scaled until a refinement pass shrinks the error
about as much as trained models' passes do; the factor stands in the report.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lrt_core.checkpoint import BUNDLED, load_config, load_model
from lrt_core.config import ModelConfig, RecurrenceConfig
from lrt_core.hardware import limit_threads
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.native_model import NativeModel, Quantization
from lrt_core.refine import refine
from server.bench import shapes
from server.bench.cost import Cost, cost_of
from server.engine.loader import DTYPES, is_bf16_fast, is_small, serving_model
from server.engine.model_runner import ServingModel

CONTRACTION = 3.3
"""How much a refinement pass shrinks the error in trained models; the bench model is scaled to it."""

FORMS: dict[str, tuple[Quantization, ...]] = {
    "none": ("none",),
    "int8": ("int8",),
    "int8-memory": ("int8-memory",),
    "both": ("none", "int8"),
    "all": ("none", "int8-memory", "int8"),
}
"""What `--quantize` measures, in turns; a model without memory projections in full where `int8-memory` is asked for."""

MAX_LEN = 16384
"""Longest sequence that is measured, in tokens."""


@dataclass(frozen=True)
class Subject:
    """A model as it serves and as the oracle reads with it, what its step must read and compute, and how much its passes
    contract (None: not measured). quantize: the form of its weights."""

    label: str
    model: ServingModel
    plain: LatentRecurrentTransformer
    cost: Cost
    contraction: float | None = None
    quantize: Quantization = "none"

    @property
    def is_recurrent(self) -> bool:
        """Whether memory enters its layers."""
        return self.model.config.recurrence is not None


def subjects(args: Namespace, shape: ModelConfig | None = None) -> Iterator[Subject]:
    """The models that the arguments name, one after the other, so that unserved forms do not pile up in memory. shape: of
    the bench model, d12's without it."""
    if args.model != shapes.D12_NAME:
        model = load_model(args.model or BUNDLED, dtype=resolve_dtype(args, load_config(args.model or BUNDLED)))
        yield from _forms(Path(args.model or BUNDLED).resolve().name, model, None, args.quantize)
        return
    shape = shape or shapes.D12
    for variant in args.variant:
        model, factor = bench_model(variant, resolve_dtype(args, shape), shape)
        yield from _forms(f"{args.model} {variant}", model, factor, args.quantize)


def _forms(label: str, model: LatentRecurrentTransformer, contraction: float | None, quantize: str) -> Iterator[Subject]:
    forms = FORMS[quantize]
    if not model.config.kv_projection:
        forms = tuple(dict.fromkeys("none" if form == "int8-memory" else form for form in forms))
    for form in forms:
        yield _subject(label, model, contraction, form)


def _subject(label: str, model: LatentRecurrentTransformer, contraction: float | None, quantize: Quantization) -> Subject:
    cost, served = cost_of(model), serving_model(model, MAX_LEN, quantize)
    if isinstance(served, NativeModel):
        cost = replace(cost, weight_bytes=served.step_bytes)
    label += "" if quantize == "none" else f" {quantize}"
    return Subject(label, served, model, cost, contraction, quantize)


def resolve_dtype(args: Namespace, config: ModelConfig) -> torch.dtype:
    """The type asked for; auto is what the server would take."""
    if args.dtype in DTYPES:
        return DTYPES[args.dtype]
    return torch.bfloat16 if is_bf16_fast(config, "cpu") and not is_small(config, "cpu") else torch.float32


def set_threads(args: Namespace, config: ModelConfig) -> None:
    """As many threads as asked for; else as many as the server would take."""
    limit_threads()
    if args.threads or is_small(config, "cpu"):
        torch.set_num_threads(args.threads or 1)


def bench_model(variant: str, dtype: torch.dtype, shape: ModelConfig) -> tuple[LatentRecurrentTransformer, float | None]:
    """A model of `shape` with random weights, and the contraction factor of its recurrence (None without one)."""
    kind = shapes.VARIANTS[variant]
    recurrence = RecurrenceConfig(shape.num_layers - 1, kind) if kind is not None else None
    model = LatentRecurrentTransformer(replace(shape, recurrence=recurrence)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for name, weight in model.named_parameters():
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            weight.normal_(0.0, weight.shape[1] ** -0.5 / shape.num_layers, generator=generator)
    factor = _scale_recurrence(model, generator) if recurrence is not None else None
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.data = weight.data.to(dtype)
    return model.eval(), factor


def _scale_recurrence(model: LatentRecurrentTransformer, generator: torch.Generator) -> float:
    """Scale gamma and the memory projections by bisection until a pass contracts by about CONTRACTION; returns the factor."""
    tokens = torch.randint(0, model.config.vocab_size, (1, 64), generator=generator)
    parts = [weight for name, weight in model.named_parameters() if name.startswith("memory_")]
    originals = [part.clone() for part in parts]
    low, high, factor = 0.0, 4.0, 1.0
    for _ in range(12):
        scale = (low + high) / 2
        for part, original in zip(parts, originals, strict=True):
            part.copy_(original * scale)
        factor = contraction(model, tokens)
        low, high = (scale, high) if factor > CONTRACTION else (low, scale)
    return factor


def contraction(model: LatentRecurrentTransformer, tokens: torch.Tensor) -> float:
    """Geometric mean of the factors by which passes 2 to 5 shrink the largest change of a memory; tokens [1, T]."""
    residuals = refine(model, tokens, tolerance=0.0, max_passes=5).residuals
    return float((residuals[1] / max(residuals[4], 1e-12)) ** (1 / 3))
