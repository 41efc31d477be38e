"""The proofs at a scale for every run."""

from __future__ import annotations

import pytest
import torch

from tests.proofs.echo_memory import BOUND, measure
from tests.proofs.scoring import BOUNDS, SCORED, count_differing, self_consistency
from tests.proofs.soak import TURNS, soak


@pytest.mark.slow
@pytest.mark.parametrize("variant", SCORED)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_sequences_score_themselves(dtype: torch.dtype, variant: str) -> None:
    found = self_consistency(24, dtype, variant)
    assert max(found.cold, found.cached, found.forked, found.preempted) <= BOUNDS[dtype]
    assert found.num_hits > 0 and found.num_preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}])
def test_requests_do_not_see_each_other(sampling: dict[str, float]) -> None:
    assert count_differing(24, **sampling) == 0


@pytest.mark.slow
def test_nothing_is_left_after_random_traffic() -> None:
    found = soak(400, max_rounds=1)
    assert found.num_aborted > 20
    assert found.num_preemptions > 0
    assert found.num_used_blocks == found.num_tasks == 0
    assert len(found.ratios) == TURNS
    assert max(found.traced[5:]) < 1.5 * max(found.traced[:5])


@pytest.mark.slow
def test_a_long_echo_stays_within_its_memory() -> None:
    assert 0 < measure() < BOUND
