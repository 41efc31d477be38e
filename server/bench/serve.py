"""`lrt-bench serve`: an OpenAI-compatible server under HTTP load, ours or another, or both in turns.

Our own server runs in a process of its own, beside it (in turns, so that each has the machine alone) the engine without HTTP:
the ratio is what HTTP costs. Neighbours: `load.py` is the clients, `processes.py` starts everything.
"""

from __future__ import annotations

import itertools
import secrets
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from lrt_core.checkpoint import BUNDLED, load_config
from server.bench import api_probe, checkpoint, shapes
from server.bench.errors import BenchError
from server.bench.limits import Limits
from server.bench.load import Job, Outcome
from server.bench.model import resolve_dtype
from server.bench.processes import SERVED_NAME, Worker, engine_worker, own_server, run_load
from server.bench.repeat import Work, interleave
from server.bench.report import Figure, Report, percentiles, ratios

COMMON_IDS = 1000
"""Every vocabulary has more ids than these; what is drawn for servers whose vocabulary is unknown."""
OPEN_LOOP_SECONDS = 10
WARM_TOKENS = 8
_seeds = itertools.count(secrets.randbits(40))
"""Of loads: no server that runs on from one program to the next shall have seen a prompt before, and cached it."""


@dataclass(frozen=True)
class Point:
    """One load: a number of clients or a rate per second, and how many requests."""

    clients: int | None
    rate: float | None
    requests: int

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.clients} client(s)" if self.clients is not None else f"{self.rate:g} requests/s"


@dataclass
class Target:
    """A server and the job it understands; `outcomes` are those of the point at hand."""

    name: str
    job: Job
    outcomes: list[Outcome] = field(default_factory=list)

    def work(self, point: Point) -> Work:
        """Its part of a repetition."""
        self.outcomes = []
        return Work(self.name, lambda: self._measure(point), lambda: self._warm(point))

    def _warm(self, point: Point) -> None:
        tokens = min(WARM_TOKENS, self.job.new_tokens)
        self._run(replace(self.job, new_tokens=tokens), replace(point, requests=point.clients or 1))

    def _measure(self, point: Point) -> float:
        outcome = self._run(self.job, point)
        self.outcomes.append(outcome)
        return outcome.tokens / outcome.seconds

    def _run(self, job: Job, point: Point) -> Outcome:
        """One load of fresh prompts. Raises BenchError when nothing at all was answered."""
        load = replace(job, clients=point.clients, rate=point.rate, requests=point.requests, seed=next(_seeds))
        outcome = run_load(load)
        if outcome.tokens == 0:
            reasons = ", ".join(outcome.errors) or f"nothing was answered within {job.time_limit:g} s"
            raise BenchError(f"{self.name} ({job.url}), {point.name}: {reasons}")
        return outcome


def run(args: Namespace, report: Report, limits: Limits) -> None:
    """Every load on every server, in turns."""
    with ExitStack() as stack:
        own: tuple[Target, Worker | None] = (
            stack.enter_context(_own(args, report)) if args.url is None else (_given(args), None)
        )
        ours, worker = own
        targets = [_adapted(ours, args, report)]
        if args.compare is not None:
            key = args.compare_api_key
            model = args.compare_model or _listed(args, args.compare, key)
            other = replace(targets[0].job, url=args.compare, model=model, api_key=key)
            targets.append(_adapted(Target("other", other), args, report))
            targets = _alike(targets)
        for point in points(args):
            _measure(point, targets, worker if point.clients is not None else None, args, report)


def points(args: Namespace) -> Iterator[Point]:
    """The loads that the arguments name; twice as many requests as clients, or a rate for ten seconds, unless told."""
    for clients in args.clients or ([] if args.rate else [1, 4, 16]):
        yield Point(clients, None, args.requests or 2 * clients)
    for rate in args.rate or []:
        yield Point(None, rate, args.requests or max(1, round(OPEN_LOOP_SECONDS * rate)))


@contextmanager
def _own(args: Namespace, report: Report) -> Iterator[tuple[Target, Worker]]:
    """Our server and our engine, each in its process."""
    with tempfile.TemporaryDirectory(prefix="lrt-bench-") as folder, ExitStack() as stack:
        directory = args.model or BUNDLED
        if args.model == shapes.D12_NAME:
            directory = Path(folder) / shapes.D12_NAME
            checkpoint.write(args, directory, report)
        config = load_config(directory)
        length = args.prompt_len + args.new_tokens
        if length > config.sequence_len and "--max-model-len" not in args.server_flags:
            raise BenchError(f"prompt and output are {length} tokens, the model's context is {config.sequence_len}")
        flags = ["--dtype", str(resolve_dtype(args, config)).removeprefix("torch."), "--quantize", args.quantize]
        flags += ["--threads", str(args.threads)] if args.threads else []
        num_seqs = max(point.clients or 1 for point in points(args))
        sizes = ["--max-num-seqs", str(num_seqs), "--max-len", str(length)]
        worker = stack.enter_context(engine_worker(directory, [*flags, *sizes]))
        url = stack.enter_context(own_server(directory, [*flags, *args.server_flags]))
        vocab_size = min(COMMON_IDS, config.vocab_size) if args.compare else config.vocab_size
        yield Target("ours", _job(args, url, SERVED_NAME, vocab_size)), worker


def _given(args: Namespace) -> Target:
    job = _job(args, args.url, args.model_name or _listed(args, args.url, args.api_key))
    return Target("ours" if args.compare else "server", replace(job, api_key=args.api_key))


def _listed(args: Namespace, url: str, key: str) -> str:
    return api_probe.model_name(url, args.timeout, key)


def _job(args: Namespace, url: str, model: str, vocab_size: int = COMMON_IDS) -> Job:
    return Job(
        url=url,
        model=model,
        clients=None,
        rate=None,
        requests=1,
        prompt_len=args.prompt_len,
        new_tokens=args.new_tokens,
        stream=args.stream,
        seed=0,
        vocab_size=vocab_size,
        prompts_are_ids=args.prompts == "ids",
        request_timeout=args.timeout,
        time_limit=args.max_seconds,
    )


def _adapted(target: Target, args: Namespace, report: Report) -> Target:
    """The target with a job that its server takes."""
    job, left_out = api_probe.adapt(target.job)
    if left_out:
        report.say(f"{target.name} ({job.url}) refuses {', '.join(left_out)}: measured without")
    return Target(target.name, job)


def _alike(targets: Sequence[Target]) -> list[Target]:
    """The same kind of prompt for all."""
    all_ids = all(target.job.prompts_are_ids for target in targets)
    return [replace(target, job=replace(target.job, prompts_are_ids=all_ids)) for target in targets]


def _measure(point: Point, targets: Sequence[Target], worker: Worker | None, args: Namespace, report: Report) -> None:
    works = [target.work(point) for target in targets]
    if worker is not None:
        works.append(Work("engine alone", lambda: _offline(worker, point, args)))
    samples = interleave(works, args.repetitions, point.name)
    for target, own in zip(targets, samples, strict=False):
        report.add(_figure(target, point, own))
    for work, own in zip(works[1:], samples[1:], strict=True):
        if work.name == "engine alone":
            report.add(Figure(f"{work.name}: {point.name}", "tok/s", own, {"clients": point.clients}))
        report.add(Figure(f"ours over {work.name}: {point.name}", "x", ratios(samples[0], own), _place(point)))


def _offline(worker: Worker, point: Point, args: Namespace) -> float:
    load = {"clients": point.clients, "requests": point.requests, "prompt_len": args.prompt_len, "new_tokens": args.new_tokens}
    return float(worker.ask(load, args.max_seconds)["tokens_per_second"])


def _place(point: Point) -> dict[str, float | int | None]:
    return {"clients": point.clients, "rate": point.rate, "requests": point.requests}


def _figure(target: Target, point: Point, samples: Sequence[float]) -> Figure:
    """Tokens per second over all clients; latencies and failures of all repetitions together."""
    outcomes = target.outcomes
    errors = sum((Counter(outcome.errors) for outcome in outcomes), Counter[str]())
    unfinished = sum(outcome.num_unfinished for outcome in outcomes)
    finished = sum(outcome.num_finished for outcome in outcomes)
    times = {
        name: percentiles([1000 * value for outcome in outcomes for value in getattr(outcome, name)])
        for name in ("first_token", "gaps", "latency", "lateness")
    }
    per_event = sum(outcome.tokens for outcome in outcomes) / max(1, sum(outcome.num_events for outcome in outcomes))
    details = {
        **_place(point),
        "stream": target.job.stream,
        "url": target.job.url,
        "model": target.job.model,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in outcomes) / max(1, finished),
        "tokens": sum(outcome.tokens for outcome in outcomes) / max(1, finished),
        "tokens_per_event": per_event,
        "errors": dict(errors),
        "unfinished": unfinished,
        "milliseconds": times,
    }
    return Figure(f"{target.name}: {point.name}", "tok/s", samples, details, _remark(times, per_event, errors, unfinished))


LABELS = {"first_token": "first token", "gaps": "between tokens", "latency": "whole answer", "lateness": "sent late by"}


def _remark(times: dict[str, dict[str, float] | None], per_event: float, errors: Counter[str], unfinished: int) -> str:
    """A line of its own for the latencies, and one for each failure. per_event: tokens that came together in a stream."""
    labels = {**LABELS, "gaps": f"between events of {per_event:.1f} tokens"} if per_event > 1.05 else LABELS
    parts = [f"{labels[name]} {_three(values)}" for name, values in times.items() if values is not None]
    lines = [f"ms at p50/p95/p99: {', '.join(parts)}"]
    lines += [f"failed {count} times: {reason}" for reason, count in errors.most_common()]
    lines += [f"{unfinished} requests were unfinished at the time limit"] if unfinished else []
    return "".join(f"\n    {line}" for line in lines)


def _three(values: dict[str, float]) -> str:
    return "/".join(f"{value:.1f}" for value in values.values())
