"""`lrt-bench offline`: decoding on the engine alone, how near it comes to the read bandwidth, and what recurrence costs."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from functools import partial

from server.bench.checkpoint import contraction_line
from server.bench.limits import Limits
from server.bench.model import Subject, subjects
from server.bench.repeat import Work, interleave
from server.bench.report import Figure, Report, ratios
from server.bench.work import decode_rate, make_engine


def run(args: Namespace, report: Report, limits: Limits) -> None:
    """Every model at every number of clients; the models take turns and keep their engines."""
    models = list(subjects(args))
    for subject in models:
        announce(subject, report)
    max_len = args.prompt_len + args.new_tokens
    engines = [make_engine(subject.model, max(args.clients), max_len) for subject in models]
    for clients in args.clients:
        works = [
            Work(subject.label, partial(decode_rate, engine, clients, args.prompt_len, args.new_tokens))
            for subject, engine in zip(models, engines, strict=True)
        ]
        samples = interleave(works, args.repetitions, f"{clients} clients")
        for subject, own in zip(models, samples, strict=True):
            report.add(_figure(subject, clients, own, limits))
        for figure in (*recurrence_costs(models, samples, clients), *quantization_gains(models, samples, clients)):
            report.add(figure)


def announce(subject: Subject, report: Report) -> None:
    """A line about a model before it is measured."""
    about = contraction_line(subject.contraction)
    size = f"{subject.cost.weight_bytes / 1e6:.0f} MB of weights read by a step"
    report.say(f"{subject.label}: {subject.model.dtype}, {size}{'; ' + about if about else ''}".replace("torch.", ""))


def _figure(subject: Subject, clients: int, samples: Sequence[float], limits: Limits) -> Figure:
    """Tokens per second, and the share of the read bandwidth that reading the weights once a step takes."""
    bytes_per_second = statistics.median(samples) / clients * subject.cost.weight_bytes
    share = bytes_per_second / limits.read_bandwidth
    details = {"weight_bytes_per_step": subject.cost.weight_bytes, "bandwidth_fraction": share, "clients": clients}
    remark = f"{share:.0%} of the read bandwidth"
    return Figure(f"{subject.label}: decode, {clients} client(s)", "tok/s", samples, details, remark)


def recurrence_costs(models: Sequence[Subject], samples: Sequence[Sequence[float]], clients: int) -> list[Figure]:
    """By how many percent a token takes longer than in the same backbone without recurrence, repetition by repetition."""
    plain = {model.quantize: own for model, own in zip(models, samples, strict=True) if not model.is_recurrent}
    figures = []
    for model, own in zip(models, samples, strict=True):
        form = "none" if model.quantize == "int8-memory" else model.quantize  # what the rest of the model is in
        if model.is_recurrent and form in plain:
            costs = [100 * (ratio - 1) for ratio in ratios(plain[form], own)]
            name = f"{model.label}: recurrence costs, {clients} client(s)"
            figures.append(Figure(name, "%", costs, {"clients": clients}, "of a token's time without it"))
    return figures


def quantization_gains(models: Sequence[Subject], samples: Sequence[Sequence[float]], clients: int) -> list[Figure]:
    """How many times as fast each model is in 8 bits, where both forms were measured."""
    full = {id(model.plain): own for model, own in zip(models, samples, strict=True) if model.quantize == "none"}
    return [
        Figure(f"{model.label} over full weights, {clients} client(s)", "x", ratios(own, full[id(model.plain)]))
        for model, own in zip(models, samples, strict=True)
        if model.quantize != "none" and id(model.plain) in full
    ]
