"""`python -m tests.proofs`: every proof at full scale, with its figures. Exit status 1 when a claim does not hold."""

from __future__ import annotations

import argparse
import itertools
import sys
from statistics import quantiles

import torch

from tests.proofs.echo_memory import BOUND, NUM_TOKENS, VOCAB_SIZE, measure
from tests.proofs.scoring import BOUNDS, SCORED, count_differing, self_consistency
from tests.proofs.soak import soak, standard_error


def main() -> int:
    """Run them all; 0 when all hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of requests (default 1)")
    scale = parser.parse_args().scale
    torch.set_num_threads(1)
    held = [_consistency(int(500 * scale)), _invariance(int(200 * scale)), _soak(int(10_000 * scale)), _echo()]
    return 0 if all(held) else 1


def _consistency(count: int) -> bool:
    held = True
    for (dtype, bound), variant in itertools.product(BOUNDS.items(), SCORED):
        found = self_consistency(count, dtype, variant)
        worst = max(found.cold, found.cached, found.forked, found.preempted)
        print(f"{count} sequences scored again, {variant}, {dtype} (bound {bound:g}): {found}", flush=True)
        held = held and worst <= bound and found.num_hits > 0 and found.num_preemptions > 0
    return held


def _invariance(count: int) -> bool:
    ways: list[dict[str, float]] = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}]
    differing = [count_differing(count, **sampling) for sampling in ways]
    print(f"{count} requests alone, in batches and in traffic; requests with other ids:")
    for sampling, number in zip(ways, differing, strict=True):
        print(f"  {sampling or 'greedy'}: {number}", flush=True)
    return not any(differing)


def _soak(count: int) -> bool:
    found = soak(count)
    print(f"{count} requests, {found.num_aborted} aborted; per tenth of them:")
    print("  requests a second:", *(f"{rate:.0f}" for rate in found.rates))
    low, middle, high = quantiles(found.ratios, n=4)
    spread = f"median {middle:.3f} (standard error {standard_error(found.ratios):.3f}), quartiles {low:.3f} to {high:.3f}"
    print(f"  rate afterwards over that of fresh processes, in {len(found.ratios)} turns: {spread}")
    print("  KiB traced:", *(size // 1024 for size in found.traced))
    print("  MiB resident:", *(size // 2**20 for size in found.resident))
    print(f"  {found.num_preemptions} preemptions; blocks left: {found.num_used_blocks}, tasks left: {found.num_tasks}")
    # The first tenth pays for what is made once.
    is_flat = found.traced[-1] <= 1.1 * found.traced[1] and found.resident[-1] <= 1.05 * found.resident[1]
    has_none_left = found.num_used_blocks == found.num_tasks == 0
    return has_none_left and found.num_preemptions > 0 and is_flat and middle >= 0.95


def _echo() -> bool:
    size = measure()
    print(f"an echo of {NUM_TOKENS} tokens at a vocabulary of {VOCAB_SIZE}: {size / 2**20:.0f} MiB (bound {BOUND / 2**20:.0f})")
    return size < BOUND


if __name__ == "__main__":
    sys.exit(main())
