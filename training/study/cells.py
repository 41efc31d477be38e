"""One run of a study: train it in its folder, or go on there, then measure it. Neighbours: `plan.py`, `runner.py`.

A cell's state lies in its folder while it trains; only the measured result is kept, and the checkpoint where asked for.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrt_core.tokenizer import Tokenizer
from training.data import ShardedCorpus
from training.evaluate import bits_per_byte, parallel_bpb, sequential_bpb
from training.finish import finish
from training.measures import contraction, refined_losses
from training.state import has_states
from training.study.plan import Cell, Plan
from training.trainer import Trainer

TOLERANCE, MAX_PASSES = 1e-6, 64
"""Of the refinement that gives the sequential figure; what has not settled after so many passes is decoded token by token."""


class Surroundings(NamedTuple):
    """What all cells of a study share: where they lie, on what they train, which device, threads of an operator."""

    folder: Path
    corpus: ShardedCorpus
    tokenizer: Tokenizer
    device: str
    threads: int
    keep_checkpoints: bool


def run_cell(plan: Plan, cell: Cell, around: Surroundings, started: Callable[[Trainer], None]) -> dict[str, Any] | None:
    """Train and measure; returns the result as plain data, or None when it was stopped, with its state saved.

    started: is given the trainer before its first step, to be able to stop it.
    """
    folder = around.folder / "cells" / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a", encoding="utf-8") as output, redirect_stderr(output):
        trainer = _trainer(plan, cell, around, folder)
        started(trainer)
        if not trainer.run():
            return None
        trainer.gradients.release()
        result = {**describe(plan, cell, trainer), **_measured(trainer)}
        if around.keep_checkpoints:
            finish(trainer, around.folder / "checkpoints" / cell.name)
    shutil.rmtree(folder)
    return result


def _trainer(plan: Plan, cell: Cell, around: Surroundings, folder: Path) -> Trainer:
    device = torch.device(around.device)
    if has_states(folder):
        return Trainer.resume(folder, around.corpus, device)
    config = plan.config(cell, around.tokenizer.vocab_size)
    command = f"lrt-train study --plan {plan.name} --variants {cell.variant.name} --budgets {cell.tokens_per_parameter:g}"
    command += " --keep-checkpoints"
    return Trainer.create(config, folder, around.corpus, around.tokenizer, command, device)


def describe(plan: Plan, cell: Cell, trainer: Trainer) -> dict[str, Any]:
    """What a cell was: variant, budget, sizes, and what its training cost in tokens and seconds."""
    config, variant = trainer.config, cell.variant
    num_tokens = config.num_steps * config.batch_size * config.model.sequence_len
    return {
        "cell": cell.name,
        "variant": variant.name,
        "seed": cell.seed,
        "schedule": variant.schedule,
        "schedule_options": variant.schedule_options,
        "recurrence": None if variant.recurrence is None else asdict(variant.recurrence),
        "tokens_per_parameter": cell.tokens_per_parameter,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": config.num_steps,
        "tokens": num_tokens,
        "forwards_per_step": variant.cost,
        "effective_tokens": round(num_tokens * variant.cost),
        "seconds": round(trainer.elapsed, 1),
    }


@torch.no_grad()
def _measured(trainer: Trainer) -> dict[str, Any]:
    """BPB on the validation rows in float32: parallel as the schedule trains, sequential as served."""
    model, rows, byte_lengths = trainer.model.eval(), trainer.eval_rows, trainer.byte_lengths
    parallel = parallel_bpb(model, trainer.schedule, rows, byte_lengths, batch_size=32)
    refined = refined_losses(model, rows, TOLERANCE, MAX_PASSES, batch_size=32)
    if refined.settled:
        sequential = bits_per_byte(refined.losses, rows[:, 1:], byte_lengths)
    else:
        sequential = sequential_bpb(model, rows, byte_lengths)
    return {
        "parallel_bpb": parallel.passes,
        "merged_bpb": parallel.merged,
        "sequential_bpb": sequential,
        "contraction": contraction(refined.residuals),
        "evaluated_tokens": rows[:, 1:].numel(),
    }


def step_seconds(plan: Plan, around: Surroundings, repetitions: int = 9, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of whole training steps of each variant, alone on the machine, the variants taking turns."""
    folder = around.folder / "timing"
    trainers = {}
    for variant in plan.variants:
        cell = Cell(variant, variant.budgets[0], plan.base.seed)
        config = replace(plan.config(cell, around.tokenizer.vocab_size), eval_rows=1)
        run = folder / variant.name
        shutil.rmtree(run, ignore_errors=True)
        device = torch.device(around.device)
        trainers[variant.name] = Trainer.create(config, run, around.corpus, around.tokenizer, "timing", device)
    turns = [{name: _timed(trainer) for name, trainer in trainers.items()} for _ in range(warmup + repetitions)]
    shutil.rmtree(folder)
    return {name: [turn[name] for turn in turns[warmup:]] for name in trainers}


def _timed(trainer: Trainer) -> float:
    started = time.perf_counter()
    trainer.step()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)  # what is left of the optimizer's step is this one's
    return time.perf_counter() - started
