"""What parity tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lrt_core import kernels

SETS = kernels.instruction_sets() if kernels.is_native() else ["none"]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every set that this processor has, in turns; one that does not exist where nothing native does."""
    if request.param == "none":
        yield request.param
        return
    with kernels.using_instruction_set(request.param):
        yield request.param
