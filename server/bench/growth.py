"""`lrt-bench growth`: how a decode step's time grows with batch and context, and a prompt's with its length.

Beside each time stands what the machine's limits allow (`cost.py`): reading and computing at once, and one after the other.
Neighbours: `plots.py` draws what this measures.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lrt_core.hardware import available_memory
from lrt_core.paged import PagedPool
from server.bench import plots, shapes
from server.bench.errors import BenchError
from server.bench.limits import Limits
from server.bench.model import Subject, subjects
from server.bench.offline import announce
from server.bench.repeat import Work, interleave
from server.bench.report import Figure, Report
from server.bench.work import BLOCK_SIZE, make_engine, random_ids, random_request, read_prompt
from server.engine.engine import Engine

STEPS = 8
"""Decode steps of one sample, of which the median counts."""
MEMORY_SHARE = 0.7
"""Of the free memory, for the cache; larger points are left out."""


@dataclass(frozen=True)
class Point:
    """One decode step: how many sequences, and how many tokens each sees."""

    batch: int
    context: int


def run(args: Namespace, report: Report, limits: Limits) -> None:
    """Decode steps, then prompts, for every model; plots at the end. Raises BenchError when there is nothing to draw with."""
    if args.plots is not None:
        plots.require()
    longest = max(*args.prompt_lens, *args.contexts) + 2 * STEPS
    shape = replace(shapes.D12, sequence_len=max(shapes.D12.sequence_len, longest))
    for subject in subjects(args, shape):
        announce(subject, report)
        _run_decode(subject, args, report, limits)
        _run_prompts(subject, args, report, limits)
    if args.plots is not None:
        for path in draw(report, args.plots):
            report.say(f"wrote {path}")


def _run_decode(subject: Subject, args: Namespace, report: Report, limits: Limits) -> None:
    chosen = list(_points(subject, args, report))
    if not chosen:
        return
    num_blocks = max(_num_blocks(point) for point in chosen)
    max_len = max(args.contexts) + STEPS + 1
    engine = make_engine(subject.model, max(args.batches), max_len, "sequential", num_blocks=num_blocks)
    for point in chosen:
        name = f"{subject.label}: step, batch {point.batch}, context {point.context}"
        (samples,) = interleave([Work(name, partial(step_seconds, engine, point))], args.repetitions, name)
        expected = subject.cost.decode_seconds(limits, point.batch, point.context)
        details = {"batch": point.batch, "context": point.context}
        report.add(_figure(subject, "decode", name, samples, expected, details))


def _points(subject: Subject, args: Namespace, report: Report) -> Iterator[Point]:
    """The grid of batches and contexts, as far as memory reaches."""
    room = MEMORY_SHARE * available_memory("cpu") / PagedPool.bytes_per_slot(subject.model.config, subject.model.dtype)
    for context in args.contexts:
        for batch in args.batches:
            point = Point(batch, context)
            if _num_blocks(point) * BLOCK_SIZE <= room:
                yield point
            else:
                report.say(f"{subject.label}: no memory for batch {batch} at context {context}: left out")


def _num_blocks(point: Point) -> int:
    """Each sequence's own, and one more for it that the scheduler keeps in reserve."""
    return point.batch * (-(-(point.context + STEPS + 1) // BLOCK_SIZE) + 1)


def step_seconds(engine: Engine, point: Point) -> float:
    """Median time of a decode step of sequences that count as read: what their keys and values are does not change the time."""
    vocab_size = engine.runner.model.config.vocab_size
    for _ in range(point.batch):
        engine.add(random_request(vocab_size, point.context, STEPS + 1))
    while engine.scheduler.waiting:
        engine.scheduler.schedule()  # gives blocks to as many as may read at once; what they would have read is not read
        for sequence in engine.scheduler.running:
            sequence.num_computed_tokens = sequence.num_touched_tokens = point.context - 1
    times = []
    while engine.has_work():
        started = time.perf_counter()
        output = engine.step()
        times.append(time.perf_counter() - started)
        if len(output.outputs) != point.batch:
            raise BenchError(f"a step of {point.batch} sequences came to {len(output.outputs)} tokens")
    return statistics.median(times[1:])


def _run_prompts(subject: Subject, args: Namespace, report: Report, limits: Limits) -> None:
    """Prompts of every length, one after the other on one engine; each length once to warm up costs too much, so the shortest
    warms up for all."""
    engine = make_engine(subject.model, 1, max(args.prompt_lens) + 1)
    vocab_size = subject.model.config.vocab_size
    for length in args.prompt_lens:
        ids, rows = random_ids(vocab_size, length), [1.0]

        def read(ids: tuple[int, ...] = ids, rows: list[float] = rows) -> float:
            reading = read_prompt(engine, ids)
            rows.append(reading.rows_per_token)
            return reading.seconds

        name = f"{subject.label}: prompt of {length}"
        warm = partial(read_prompt, engine, ids[: min(args.prompt_lens)])
        (samples,) = interleave([Work(name, read, warm)], args.repetitions, name)
        expected = subject.cost.prompt_seconds(limits, length, rows[-1], min(length, engine.config.window))
        details = {"prompt_len": length, "passes_per_token": rows[-1], "tokens_per_second": length / statistics.median(samples)}
        report.add(_figure(subject, "prompt", name, samples, expected, details))


def _figure(
    subject: Subject,
    kind: str,
    name: str,
    samples: Sequence[float],
    expected: tuple[float, float],
    details: Mapping[str, float],
) -> Figure:
    """Milliseconds, with the expected ones beside."""
    low, high = (1000 * seconds for seconds in expected)
    more = {"kind": kind, "model": subject.label, "expected_ms": [low, high], **details}
    return Figure(name, "ms", [1000 * seconds for seconds in samples], more, f"the limits allow {low:.2f} to {high:.2f}")


def draw(report: Report, folder: Path) -> list[Path]:
    """The report's figures as plots in `folder`."""
    kinds = {kind: [f for f in report.figures if f.details["kind"] == kind] for kind in ("decode", "prompt")}
    return [plots.decode(kinds["decode"], folder / "decode.png"), plots.prompts(kinds["prompt"], folder / "prompts.png")]
