"""`lrt-bench beside`: a decode step's time while a long prompt is read beside it, and what that much more decoding would cost.

The prompt's rows share the step with those who decode, within the budget. A step that carries them should take no longer than
one with as many more sequences to decode, but for the attention of the prompt's rows to what lies before them.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from functools import partial

from server.bench.limits import Limits
from server.bench.model import Subject, subjects
from server.bench.offline import announce
from server.bench.repeat import Work, interleave
from server.bench.report import Figure, Report, ratios
from server.bench.work import BLOCK_SIZE, make_engine, random_ids, random_request, request
from server.engine.engine import Engine

STEPS = 32
"""Of a sample without a prompt."""
START = 32
"""Tokens of the prompts of those who decode."""


def run(args: Namespace, report: Report, limits: Limits) -> None:
    """Every model at every number of clients."""
    for subject in subjects(args):
        announce(subject, report)
        for clients in args.clients:
            _measure(subject, clients, args, report)


def _measure(subject: Subject, clients: int, args: Namespace, report: Report) -> None:
    probe = make_engine(subject.model, 1, args.prompt_len + 1)
    rows = probe.config.num_prompt_rows or min(probe.config.window, probe.config.max_num_batched_tokens - clients)
    max_len = max(args.prompt_len + 1, START + args.max_steps)
    num_blocks = -(-(args.prompt_len + 1) // BLOCK_SIZE) + (clients + rows) * -(-(START + args.max_steps) // BLOCK_SIZE)
    engine = make_engine(subject.model, clients + rows + 1, max_len, num_blocks=num_blocks)
    slowest: list[float] = []
    alone = Work("alone", partial(_alone, engine, clients, args))
    beside = Work("beside", partial(_beside, engine, clients, args, slowest), partial(_alone, engine, clients, args))
    more = Work("more", partial(_alone, engine, clients + rows, args))
    samples = interleave([alone, beside, more], args.repetitions, f"{clients} clients")
    label = f"{subject.label}: step of {clients} client(s)"
    details = {"clients": clients, "prompt_rows": rows, "prompt_len": args.prompt_len}
    milliseconds = [[1e3 * one for one in own] for own in samples]
    report.add(Figure(label, "ms", milliseconds[0], details))
    remark = f"up to {rows} rows of it a step; the slowest step {1e3 * max(slowest):.1f} ms"
    report.add(Figure(f"{label} beside a prompt", "ms", milliseconds[1], details, remark))
    report.add(Figure(f"{label} and {rows} more", "ms", milliseconds[2], details))
    report.add(Figure(f"{label}, beside over alone", "x", ratios(samples[1], samples[0]), details))
    report.add(Figure(f"{label}, beside over {rows} more", "x", ratios(samples[1], samples[2]), details))


def _begin(engine: Engine, clients: int, args: Namespace) -> None:
    """Let clients come to where they decode."""
    vocab_size = engine.runner.model.config.vocab_size
    sequences = [one for _ in range(clients) for one in engine.add(random_request(vocab_size, START, args.max_steps))]
    while any(sequence.num_output_tokens == 0 for sequence in sequences):
        engine.step()


def _alone(engine: Engine, clients: int, args: Namespace) -> float:
    """Median seconds of a step in which clients decode."""
    _begin(engine, clients, args)
    seconds = [_timed(engine) for _ in range(min(STEPS, args.max_steps // 2))]
    _clear(engine)
    return statistics.median(seconds)


def _beside(engine: Engine, clients: int, args: Namespace, slowest: list[float]) -> float:
    """The same over the steps that read a prompt, or the first of them; the slowest is put by."""
    _begin(engine, clients, args)
    (sequence,) = engine.add(request(random_ids(engine.runner.model.config.vocab_size, args.prompt_len), 1))
    seconds: list[float] = []
    while not sequence.finished and len(seconds) < args.max_steps - STEPS:
        seconds.append(_timed(engine))
    _clear(engine)
    slowest.append(max(seconds))
    return statistics.median(seconds)


def _timed(engine: Engine) -> float:
    started = time.perf_counter()
    engine.step()
    return time.perf_counter() - started


def _clear(engine: Engine) -> None:
    for sequence in (*engine.scheduler.running, *engine.scheduler.waiting):
        engine.finish(sequence, "abort")
