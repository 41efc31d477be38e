"""`lrt-bench`: runs a mode, prints its table, writes its JSON, also when it is cut short.

Status 0 when done, 1 for what cannot be measured, 2 for wrong flags, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from server.bench.arguments import SEVERAL_MODELS, TRAIN, parse
from server.bench.errors import BenchError
from server.bench.report import Report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process's status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [TRAIN]:
        return _train(words[1:])
    args = parse(words)
    report = Report({"mode": args.mode, "arguments": _plain(args)})
    status = _run(args, report)
    try:
        if getattr(args, "json", None) is not None:
            report.write(args.json, interrupted=status == 130)
    except BenchError as error:
        print(f"lrt-bench: error: {error}", file=sys.stderr)
        return status or 1
    return status


def _train(flags: list[str]) -> int:
    """Training measures itself, in a process of its own: neither of the two packages imports the other."""
    try:
        return subprocess.run([sys.executable, "-m", "training.bench", *flags], check=False).returncode
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace, report: Report) -> int:
    try:
        _measure(args, report)
    except KeyboardInterrupt:
        print("lrt-bench: interrupted", file=sys.stderr)
        return 130
    except BenchError as error:
        print(f"lrt-bench: error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(args: argparse.Namespace, report: Report) -> None:
    """Raises BenchError for everything that its user can do something about."""
    # Imported here, after the flags are known to be right: they bring torch, which takes seconds.
    from lrt_core.checkpoint import BUNDLED, CheckpointError, load_config
    from server.bench import beside, checkpoint, growth, kernels, offline, prefill, scheduler, serve, shapes
    from server.bench.limits import measure_limits
    from server.bench.model import set_threads

    try:
        if args.mode == "checkpoint":
            return checkpoint.run(args, report)
        if args.mode in SEVERAL_MODELS:
            set_threads(args, shapes.D12 if args.model == shapes.D12_NAME else load_config(args.model or BUNDLED))
        limits = measure_limits()
        report.head["limits"] = limits.to_dict()
        print(limits.row(), flush=True)
        modes = {
            "offline": offline,
            "prefill": prefill,
            "beside": beside,
            "serve": serve,
            "kernels": kernels,
            "growth": growth,
            "scheduler": scheduler,
        }
        modes[args.mode].run(args, report, limits)
    except CheckpointError as error:
        raise BenchError(str(error)) from None


def _plain(args: argparse.Namespace) -> dict[str, object]:
    """The arguments as JSON can say them, but for keys."""
    told = {name: value for name, value in vars(args).items() if not name.endswith("api_key")}
    return {name: value if isinstance(value, int | float | list | None) else str(value) for name, value in told.items()}


if __name__ == "__main__":
    sys.exit(main())
