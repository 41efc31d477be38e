"""Who owns which block of the paged pool. No torch: a block is a number, a slot is block * block_size + offset.

A block carries K, V and latent of its tokens together, so freeing or sharing it does the same to the recurrence.
Neighbours: `scheduler.py` calls it, `batch.py` turns block tables into slots.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from server.engine.sequence import Sequence


class BlockManager:
    """Reference-counted blocks and the free list.

    Callers check `can_grow` before `grow`; a failed check is the scheduler's cue to wait or preempt, never an error here.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.ref_counts = [0] * num_blocks
        self._free = deque(range(num_blocks))

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody references."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Fraction of blocks in use, 0..1."""
        return 1 - len(self._free) / self.num_blocks

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that the sequence lacks to hold num_tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_table))

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether `grow` would find enough free blocks."""
        return self.num_missing_blocks(sequence, num_tokens) <= len(self._free)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Append blocks until the sequence's table holds num_tokens."""
        for _ in range(self.num_missing_blocks(sequence, num_tokens)):
            block = self._free.popleft()
            assert self.ref_counts[block] == 0
            self.ref_counts[block] = 1
            sequence.block_table.append(block)

    def free(self, sequence: Sequence) -> None:
        """Drop the sequence's references; blocks nobody else holds become free, the last one first in line."""
        for block in reversed(sequence.block_table):
            self.ref_counts[block] -= 1
            assert self.ref_counts[block] >= 0
            if self.ref_counts[block] == 0:
                self._free.append(block)
        sequence.block_table.clear()

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Assert that reference counts, free list and the block tables of all sequences tell the same story."""
        counts = Counter(block for sequence in sequences for block in sequence.block_table)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        for block in range(self.num_blocks):
            assert self.ref_counts[block] == counts[block], f"block {block}: {self.ref_counts[block]} != {counts[block]}"
            assert (block in free) == (counts[block] == 0), f"block {block} is both free and in use, or neither"
