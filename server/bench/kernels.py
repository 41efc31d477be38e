"""`lrt-bench kernels`: each native kernel against its torch twin, and against what the machine could do.

Neighbours: `kernel_cases.py` is the table of what is measured.
"""

from __future__ import annotations

import itertools
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch

from lrt_core.kernels import is_native
from server.bench.errors import BenchError
from server.bench.kernel_cases import Case, Operation, cases
from server.bench.limits import Limits
from server.bench.repeat import Work, interleave
from server.bench.report import Figure, Report, ratios
from server.engine.loader import DTYPES

COLD_BYTES = 2**28
"""Memory that the copies of a cold case take up together: more than the caches hold."""
MAX_COPIES = 64
SECONDS = 0.1
"""How long one sample takes, about."""


def run(args: Namespace, report: Report, limits: Limits) -> None:
    """Every case in the types asked for. Raises BenchError where no native kernels were built."""
    if not is_native():
        raise BenchError("there are no native kernels here: the package's build found no C++ compiler, or the CPU is another")
    if args.threads:
        torch.set_num_threads(args.threads)
    dtypes = tuple(DTYPES.values()) if args.dtype == "auto" else (DTYPES[args.dtype],)
    chosen = [case for case in cases(dtypes) if not args.only or any(word in case.name for word in args.only)]
    if not chosen:
        raise BenchError(f"no kernel's name holds any of {', '.join(args.only)}")
    for case in chosen:
        for figure in measure(case, args.repetitions, limits):
            report.add(figure)


@torch.inference_mode()
def measure(case: Case, repetitions: int, limits: Limits) -> list[Figure]:
    """Microseconds of the kernel with the share of the limit it reaches, and how many times its twin takes."""
    copies = _copies(case)
    works = [Work(name, _timer([getattr(copy, name) for copy in copies])) for name in ("native", "twin")]
    native, twin = interleave(works, repetitions, case.name)
    seconds = statistics.median(native)
    limit, reason = _limit(case, copies[0], limits)
    details = {"bytes": copies[0].bytes, "flops": copies[0].flops, "limit_fraction": limit / seconds, "limit": reason}
    remark = (
        f"{limit / seconds:.0%} of the {reason}" if reason else f"{copies[0].bytes / seconds / 1e9:.1f} GB/s from the cache"
    )
    return [
        Figure(case.name, "us", [1e6 * value for value in native], details, remark),
        Figure(
            "  torch over native", "x", ratios(twin, native), {"case": case.name, "torch_us": 1e6 * statistics.median(twin)}
        ),
    ]


def _copies(case: Case) -> list[Operation]:
    """Enough operands that a cold case never finds them in a cache."""
    first = case.make()
    number = min(MAX_COPIES, COLD_BYTES // max(1, first.bytes)) if case.is_cold else 0
    return [first, *(case.make() for _ in range(number))]


def _limit(case: Case, operation: Operation, limits: Limits) -> tuple[float, str]:
    """Seconds that the machine needs at least, and which of its limits that is; no name where neither limit is meant."""
    compute = operation.flops / limits.gemm(case.dtype)
    read = operation.bytes / limits.read_bandwidth
    if not case.is_cold:
        return read, ""
    return (read, "read bandwidth") if read >= compute else (compute, "matrix rate")


def _timer(runs: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """Something that gives the mean seconds of a run, over as many runs as take SECONDS, walking through the copies."""
    turns = itertools.cycle(runs)

    def sample() -> float:
        started, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < SECONDS or count == 0:
            for _ in range(len(runs)):
                next(turns)()
            count += len(runs)
        return passed / count

    return sample
