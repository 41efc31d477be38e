"""`python -m training.bench`, also `lrt-bench train`: the speed of every schedule's step beside a baseline step's.

A step is forward and backward, without the optimizer. Schedules take turns, so that a machine which slows down for a minute
slows all of them; ratios are taken within a turn. Peak memory is measured once for each schedule in a process of its own.
Neighbours: `schedules/`, `trainer.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from lrt_core.config import ModelConfig, RecurrenceConfig, Variant
from lrt_core.hardware import has_fast_bf16, limit_threads
from lrt_core.model import LatentRecurrentTransformer
from training.command import positive, status_of
from training.schedules.registry import bind, entry
from training.trainer import prepare

BASELINE = "baseline"
SCHEDULES: dict[str, tuple[str, dict[str, object]]] = {
    BASELINE: (BASELINE, {}),
    "interleaved": ("interleaved", {"num_subsets": 2}),
    "interleaved_refresh": ("interleaved", {"num_subsets": 2, "kv_refresh": True}),
    "multi_refine": ("multi_refine", {"num_refinements": 2}),
    "multi_refine_detached": ("multi_refine", {"num_refinements": 2, "detach": True}),
    "chunked": ("chunked", {"chunk_len": 128}),
}
"""What is measured, by the name in table and JSON."""


class Shape(NamedTuple):
    """The model and the batch; what is stated in the project's goals by default."""

    batch_size: int = 8
    sequence_len: int = 512
    num_layers: int = 6
    hidden_size: int = 384
    vocab_size: int = 4096

    def config(self, recurrence: RecurrenceConfig | None) -> ModelConfig:
        """Heads of 64 and value embeddings on alternating layers, with or without recurrence."""
        heads = max(1, self.hidden_size // 64)
        return ModelConfig(
            vocab_size=self.vocab_size,
            sequence_len=self.sequence_len,
            num_layers=self.num_layers,
            num_heads=heads,
            num_kv_heads=heads,
            hidden_size=self.hidden_size,
            value_embeddings="alternating",
            recurrence=recurrence,
        )


class Setup(NamedTuple):
    """How steps are made: shape, recurrence, type and the trainer's two options."""

    shape: Shape
    variant: Variant
    dtype: str
    compile: bool
    recompute: bool


def make_step(setup: Setup, name: str) -> Callable[[], float]:
    """A function that makes one forward and backward of a schedule and returns its seconds."""
    schedule_name, options = SCHEDULES[name]
    recurrence = RecurrenceConfig(setup.shape.num_layers - 1, setup.variant) if entry(schedule_name).is_recurrent else None
    model = LatentRecurrentTransformer(setup.shape.config(recurrence))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    prepare(model, setup.compile, setup.recompute)
    schedule = bind(schedule_name, options)
    size = (setup.shape.batch_size, setup.shape.sequence_len + 1)
    rows = torch.randint(setup.shape.vocab_size, size, generator=generator)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16) if setup.dtype == "bfloat16" else nullcontext

    def step() -> float:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        with autocast():
            losses = schedule(model, rows[:, :-1], rows[:, 1:])
        losses.total.backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - started

    return step


def peak_memory(setup: Setup, name: str, threads: int) -> int:
    """Bytes that a schedule's steps add to a new process at most, weights and their gradients included.

    ValueError where the system does not tell: Linux does.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("peak memory can be measured on Linux alone; give --no-memory")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (setup, name, threads))


def _peak_here(setup: Setup, name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    small = make_step(setup._replace(shape=Shape(1, 8, 1, 64, 64)), name)
    small()  # brings in libraries, which count for no schedule
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, at what is resident now
    before = _peak_resident()
    step = make_step(setup, name)
    for _ in range(2):
        step()
    return _peak_resident() - before


def _peak_resident() -> int:
    """Bytes of this process that were resident at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def measure(setup: Setup, names: Sequence[str], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every schedule's steps, one in each turn after one turn to warm up."""
    steps = {name: make_step(setup, name) for name in names}
    for step in steps.values():
        step()
    turns = [{name: step() for name, step in steps.items()} for _ in range(repetitions)]
    return {name: [turn[name] for turn in turns] for name in names}


def summary(seconds: dict[str, list[float]], peaks: dict[str, int], num_tokens: int) -> dict[str, dict[str, Any]]:
    """By schedule: tokens a second, the step's ratio to the baseline's in the same turn, each with low and high, and memory."""
    table: dict[str, dict[str, Any]] = {}
    for name, own in seconds.items():
        rates = [num_tokens / one for one in own]
        ratios = [one / base for one, base in zip(own, seconds[BASELINE], strict=True)]
        row: dict[str, Any] = {"step_seconds": own}
        for key, values in (("tokens_per_second", rates), ("step_ratio_to_baseline", ratios)):
            row |= {key: statistics.median(values), f"{key}_low": min(values), f"{key}_high": max(values)}
        if peaks:
            ratio = peaks[name] / peaks[BASELINE] if peaks[BASELINE] else None  # a tiny baseline may add nothing
            row |= {"peak_memory_bytes": peaks[name], "memory_ratio_to_baseline": ratio}
        table[name] = row
    return table


def limits() -> dict[str, float]:
    """What the machine does at most, now: GFLOP/s of square products in both types and GB/s of reading memory."""
    results: dict[str, float] = {"threads": torch.get_num_threads()}
    for dtype in (torch.float32, torch.bfloat16):
        size = 1024 if dtype == torch.float32 or has_fast_bf16("cpu") else 256
        square = torch.ones(size, size, dtype=dtype)
        seconds = _fastest(partial(torch.mm, square, square))
        results[f"gemm_{str(dtype).removeprefix('torch.')}_gflop_s"] = 2e-9 * size**3 / seconds
    numbers = torch.ones(2**26)
    return {**results, "read_bandwidth_gb_s": 1e-9 * numbers.nbytes / _fastest(numbers.sum)}


def _fastest(work: Callable[[], object]) -> float:
    def seconds() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return min(seconds() for _ in range(5))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 where a file cannot be written, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    return status_of("lrt-bench", lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrt-bench train", description=(__doc__ or "").partition("\n\n")[2])
    add = parser.add_argument
    add("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), metavar="NAME", help="(default: all)")
    add("--repetitions", type=positive, default=5, metavar="N", help="turns (default %(default)s)")
    add("--variant", choices=get_args(Variant), default="shared", help="memory projections (default %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 where it is fast")
    for name, value in Shape()._asdict().items():
        add(f"--{name.replace('_', '-')}", type=positive, default=value, metavar="N", help="(default %(default)s)")
    add("--threads", type=positive, metavar="N", help="of torch (default: its own choice)")
    add("--compile", action="store_true", help="torch.compile of the layers")
    add("--recompute", action="store_true", help="activation checkpointing")
    add("--no-memory", action="store_true", help="measure no peak memory")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured there too")
    return parser


def _run(args: argparse.Namespace) -> None:
    limit_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = Shape(*(getattr(args, name) for name in Shape._fields))
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if has_fast_bf16("cpu") else "float32"
    setup = Setup(shape, args.variant, dtype, args.compile, args.recompute)
    names = [BASELINE, *(name for name in args.schedules if name != BASELINE)]
    machine = limits()
    print(", ".join(f"{key} {value:.4g}" for key, value in machine.items()), flush=True)
    seconds = measure(setup, names, args.repetitions)
    peaks = {} if args.no_memory else {name: peak_memory(setup, name, torch.get_num_threads()) for name in names}
    table = summary(seconds, peaks, shape.batch_size * shape.sequence_len)
    for name, row in table.items():
        print(_line(name, row))
    if args.json is not None:
        head = {"mode": "train", "setup": {**setup._asdict(), "shape": shape._asdict()}, "limits": machine}
        args.json.write_text(json.dumps({**head, "schedules": table}, indent=2) + "\n", "utf-8")


def _line(name: str, row: dict[str, Any]) -> str:
    parts = [f"{name:<22}"]
    for key, unit in (("tokens_per_second", "tok/s"), ("step_ratio_to_baseline", "x baseline")):
        parts.append(f"{row[key]:9.4g} {unit} ({row[f'{key}_low']:.4g} to {row[f'{key}_high']:.4g})")
    if "peak_memory_bytes" in row:
        parts.append(f"{row['peak_memory_bytes'] / 2**20:7.0f} MiB")
        if row["memory_ratio_to_baseline"] is not None:
            parts[-1] += f" ({row['memory_ratio_to_baseline']:.2f} x)"
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
