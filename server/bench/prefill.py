"""`lrt-bench prefill`: a prompt read by windows, token by token, and without recurrence; and by the naive oracle, for scale."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lrt_core.generate import read
from server.bench.limits import Limits
from server.bench.model import Subject, subjects
from server.bench.offline import announce
from server.bench.repeat import Work, interleave
from server.bench.report import Figure, Report, ratios
from server.bench.work import make_engine, random_ids, read_prompt
from server.engine.config import PrefillMode
from server.engine.engine import Engine

WARM_TOKENS = 64
ORACLE_TOKENS = 32
CONTINUATION = 16
"""Greedy tokens after the prompt that must be the same however it was read."""


@dataclass
class Reader:
    """One way to read: a rate per repetition, and the passes that the last one took."""

    subject: Subject
    engine: Engine
    mode: PrefillMode
    ids: tuple[int, ...]
    rows_per_token: float = 1.0

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.subject.label}: read {len(self.ids)} tokens{', ' + self.mode if self.subject.is_recurrent else ''}"

    def rate(self) -> float:
        """Prompt tokens per second."""
        reading = read_prompt(self.engine, self.ids)
        self.rows_per_token = reading.rows_per_token
        return len(self.ids) / reading.seconds

    def work(self) -> Work:
        """Its part of a repetition; a shorter prompt warms up."""
        return Work(self.name, self.rate, partial(read_prompt, self.engine, self.ids[:WARM_TOKENS]))


def run(args: Namespace, report: Report, limits: Limits) -> None:
    """Every model in every way."""
    readers: list[Reader] = []
    for subject in subjects(args):
        announce(subject, report)
        readers += _readers(subject, args.prompt_len)
    oracles = [reader for reader in readers if reader.mode == "window"]
    works = [reader.work() for reader in readers] + [_oracle_work(reader) for reader in oracles]
    samples = interleave(works, args.repetitions, "prompts")
    for reader, own in zip(readers, samples, strict=False):
        report.add(_figure(reader, own, limits))
    for work, own in zip(works[len(readers) :], samples[len(readers) :], strict=True):
        report.add(Figure(work.name, "tok/s", own))
    _compare(readers, samples, report)


def _readers(subject: Subject, prompt_len: int) -> list[Reader]:
    modes: list[PrefillMode] = ["window", "sequential"] if subject.is_recurrent else ["window"]
    ids = random_ids(subject.model.config.vocab_size, prompt_len)
    return [Reader(subject, make_engine(subject.model, 1, prompt_len + CONTINUATION, mode), mode, ids) for mode in modes]


def _oracle_work(reader: Reader) -> Work:
    ids = reader.ids[:ORACLE_TOKENS]

    def rate() -> float:
        started = time.perf_counter()
        read(reader.subject.plain, ids)
        return len(ids) / (time.perf_counter() - started)

    name = f"{reader.subject.label}: read {len(ids)} tokens, naive oracle"
    return Work(name, rate, partial(read, reader.subject.plain, ids[:2]))


def _figure(reader: Reader, samples: Sequence[float], limits: Limits) -> Figure:
    """Prompt tokens per second, passes per token, and the share of the matrix rate that all rows together take."""
    figure = Figure(reader.name, "tok/s", samples)
    flops_per_token = reader.subject.cost.prompt_flops(len(reader.ids), reader.rows_per_token) / len(reader.ids)
    share = figure.median * flops_per_token / limits.gemm(reader.subject.model.dtype)
    details = {"passes_per_token": reader.rows_per_token, "gemm_fraction": share, "prompt_len": len(reader.ids)}
    return Figure(
        reader.name, "tok/s", samples, details, f"{reader.rows_per_token:.1f} passes a token, {share:.0%} of the matrix rate"
    )


def _compare(readers: Sequence[Reader], samples: Sequence[Sequence[float]], report: Report) -> None:
    """Windows against one token at a time: how much faster, and whether the same text follows."""
    for index, reader in enumerate(readers):
        if reader.mode != "sequential":
            continue
        window = readers[index - 1]
        own, other = (read_prompt(each.engine, each.ids, CONTINUATION).output_ids for each in (window, reader))
        same = next((i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), len(own))
        remark = "identical greedy continuations" if same == len(own) else f"greedy continuations differ from token {same} on"
        details = {"identical_continuations": same == len(own), "identical_tokens": same}
        gains = ratios(samples[index - 1], samples[index])
        report.add(Figure(f"{reader.subject.label}: window over sequential", "x", gains, details, remark))
