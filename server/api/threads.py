"""Work of a request that takes long is done in a thread, so that other requests' streams go on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

MANY_CHARACTERS = 20_000
MANY_ITEMS = 5_000
"""Of text to be tokenised, and of ids or logprobs to be written: more than that is worth a thread."""


async def run_beside(is_long: bool, work: Callable[[], T]) -> T:
    """What `work` returns or raises: at once, or from a thread if it is long."""
    return await asyncio.to_thread(work) if is_long else work()
