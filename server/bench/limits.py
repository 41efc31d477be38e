"""What this machine can do at most, measured now: how fast it reads memory, and how fast it multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

READ_BYTES = 2**29
"""Read at once; far beyond any cache that a process is likely to have for itself."""
_ATTEMPTS = 5
_ENOUGH_SECONDS = 0.01
"""A product that takes this long is large enough to be timed; slow machines stop at small ones."""


@dataclass(frozen=True)
class Limits:
    """read_bandwidth in bytes/s; gemm_float32 and gemm_bfloat16 in floating-point operations/s; with `threads` threads."""

    read_bandwidth: float
    gemm_float32: float
    gemm_bfloat16: float
    threads: int

    def gemm(self, dtype: torch.dtype) -> float:
        """The rate of products in `dtype`. Weights in bfloat16 can be widened where float32 is the faster product."""
        return max(self.gemm_bfloat16, self.gemm_float32) if dtype == torch.bfloat16 else self.gemm_float32

    def row(self) -> str:
        """A line for the head of the table."""
        return (
            f"{self.threads} threads: read bandwidth {self.read_bandwidth / 1e9:.1f} GB/s, products "
            f"{self.gemm_float32 / 1e9:.0f} GFLOP/s in float32, {self.gemm_bfloat16 / 1e9:.3g} GFLOP/s in bfloat16"
        )

    def to_dict(self) -> dict[str, float]:
        """For JSON, in GB/s and GFLOP/s."""
        return {
            "read_bandwidth_gb_s": self.read_bandwidth / 1e9,
            "gemm_float32_gflop_s": self.gemm_float32 / 1e9,
            "gemm_bfloat16_gflop_s": self.gemm_bfloat16 / 1e9,
            "threads": self.threads,
        }


def measure_limits() -> Limits:
    """Measure with all of torch's threads; takes about a second."""
    return Limits(
        read_bandwidth=_read_bandwidth(READ_BYTES),
        gemm_float32=_gemm_rate(torch.float32),
        gemm_bfloat16=_gemm_rate(torch.bfloat16),
        threads=torch.get_num_threads(),
    )


def _read_bandwidth(num_bytes: int) -> float:
    """Best of several ways to read the same memory: which operator comes closest to the limit depends on the machine."""
    numbers = torch.ones(num_bytes // 4)
    ways: list[Callable[[], object]] = [numbers.sum, numbers.max]
    for rows in (1024, 4096, 16384):
        matrix = numbers.view(rows, -1)
        vector = torch.ones(matrix.shape[1])
        ways += [partial(torch.mv, matrix, vector), partial(torch.matmul, vector.unsqueeze(0), matrix.T)]
    # A first look at each, then all attempts on those that may be the best.
    first = sorted(ways, key=_seconds)
    return num_bytes / min(fastest(way, _ATTEMPTS) for way in first[:3])


def _gemm_rate(dtype: torch.dtype) -> float:
    """Of square products, of 128 rows at first and larger while they are over too soon to be timed."""
    size = 128
    while True:
        a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        product = partial(torch.matmul, a, b)
        seconds = fastest(product, 2)
        if seconds >= _ENOUGH_SECONDS or size >= 2048:
            return 2 * size**3 / min(seconds, fastest(product, 3))
        size *= 2


def fastest(work: Callable[[], object], attempts: int) -> float:
    """Seconds of the fastest of some runs."""
    return min(_seconds(work) for _ in range(attempts))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
