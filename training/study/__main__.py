"""`lrt-train study`: train a plan's runs, or what is missing of them, and write the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lrt_core.files import read_json
from lrt_core.hardware import limit_threads
from lrt_core.tokenizer import Tokenizer
from training.command import device_of, positive, status_of
from training.config import PYTHON_SOURCES
from training.data.opening import learn_tokenizer, open_corpus
from training.processes import exclusively
from training.state import TOKENIZER_FOLDER
from training.study import report
from training.study.cells import Surroundings
from training.study.plan import PLANS, Plan, StudyError, chosen
from training.study.runner import TIMING_FILE, Runner, claim, read_results

COMMAND = "lrt-train study"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 error or a failed run, 130 stopped with everything saved."""
    args = _parser().parse_args(argv)
    return status_of(COMMAND, lambda: _study(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("`: ")[2])
    add = parser.add_argument
    add("--plan", choices=sorted(PLANS), default="million", help="the runs (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="its folder; a study that lies there goes on (default: runs/study-PLAN)")
    add("--data", action="append", metavar="SOURCE", help=f"as lrt-train takes (default: {PYTHON_SOURCES}); repeatable")
    add("--shards", metavar="DIR", help="where tokenised data lie, to share them among studies (default: in DIR)")
    add("--variants", nargs="+", metavar="NAME", help="these alone")
    add("--budgets", nargs="+", type=float, metavar="X", help="tokens per parameter, in place of the plan's")
    add("--seeds", type=positive, metavar="N", help="so many seeds of every run")
    add("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default %(default)s)")
    add("--threads", type=positive, metavar="N", help="of each run (default: the cores, divided by the runs at a time)")
    add("--device", default="cpu", help="(default %(default)s)")
    add("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True, help="as lrt-train takes")
    add("--keep-checkpoints", action="store_true", help="keep every finished model in DIR/checkpoints")
    add("--list", action="store_true", help="show the runs and end")
    add("--time-only", action="store_true", help="measure the steps, on a machine that is idle, and end")
    add("--report-only", action="store_true", help="write the report of what is there and end")
    return parser


def _study(args: argparse.Namespace) -> None:
    plan = chosen(PLANS[args.plan](), args.variants, args.budgets, args.seeds)
    if args.data is not None:
        plan = replace(plan, base=replace(plan.base, data=tuple(args.data)))
    plan = replace(plan, base=replace(plan.base, shards=args.shards, cuda_graphs=args.cuda_graphs))
    folder: Path = args.out or Path("runs") / f"study-{args.plan}"
    if args.list:
        return _list(plan)
    if args.report_only:
        return _report(folder, plan)
    device_of(args.device)
    limit_threads()
    with exclusively(folder):
        _run(plan, folder, args)


def _run(plan: Plan, folder: Path, args: argparse.Namespace) -> None:
    """Train what is missing, or time the steps alone, in a folder that is ours."""
    tokenizer = _tokenizer(folder, plan)
    corpus = open_corpus(plan.base, folder, tokenizer)
    for remark in corpus.remarks():
        print(f"{COMMAND}: {remark}", file=sys.stderr)
    plan = claim(folder, plan, corpus.fingerprint())
    threads = args.threads or max(1, torch.get_num_threads() // args.jobs)
    around = Surroundings(folder, corpus, tokenizer, args.device, threads, args.keep_checkpoints)
    runner = Runner(plan, around, args.jobs)
    if args.time_only:
        return runner.time()
    try:
        runner.run()
    finally:
        if read_results(folder):
            _report(folder, plan)
    if runner.failures:
        first, reason = next(iter(runner.failures.items()))
        raise StudyError(
            f"{len(runner.failures)} run(s) failed, the first {first}: {reason}; start the study again to retry them"
        )


def _tokenizer(folder: Path, plan: Plan) -> Tokenizer:
    """The study's own, trained when the study begins."""
    path = folder / TOKENIZER_FOLDER
    if path.exists():
        return Tokenizer.from_directory(path)
    tokenizer = learn_tokenizer(plan.base)
    path.mkdir(parents=True)
    tokenizer.save(path)
    return tokenizer


def _list(plan: Plan) -> None:
    for cell in plan.cells():
        steps = plan.config(cell, plan.base.model.vocab_size).num_steps
        print(f"{cell.name:<40} {steps:>6} steps of {cell.variant.cost:g} forward(s)")


def _report(folder: Path, plan: Plan) -> None:
    results, timing = read_results(folder), folder / TIMING_FILE
    if not results:
        raise StudyError(f"{folder}: holds no result yet")
    done = {result["cell"] for result in results}
    missing = [cell for cell in plan.cells() if cell.name not in done]
    for path in report.write(folder, results, read_json(timing), len(missing)):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
