"""Who owns which block of the paged pool. No torch: a block is a number, a slot is block * block_size + offset.

A block carries K, V and latent of its tokens together, so freeing, sharing or copying it does the same to the recurrence. Full
blocks whose tokens are all settled are registered under a hash of everything that shaped them (the tokens up to their end, and
a root that names weights, type, prefill mode, tolerance and salt). Unreferenced blocks keep their content until they are
needed, least recently used first, so a later sequence with the same beginning takes them over.
Neighbours: `scheduler.py` calls it, `batch.py` hands block tables to the step, `model_runner.py` carries out the copies.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from server.engine.sequence import Sequence


class Copy(NamedTuple):
    """Copy the content of one block to another before the next step."""

    source: int
    target: int


class BlockManager:
    """Reference-counted blocks, the least-recently-used list of free ones, and the prefix cache.

    Too few free blocks are no error: `can_place` is asked before `place`, and `grow` says whether it could; the scheduler then
    waits or preempts. root: names what, besides the tokens, a block's content depends on; None switches the cache off.
    """

    def __init__(self, num_blocks: int, block_size: int, root: str | None = None) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.ref_counts = [0] * num_blocks
        self.copies: list[Copy] = []
        """Copies that the next step must carry out, in order."""
        self._root = root
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody references, those with cached content included."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Fraction of blocks in use, 0..1."""
        return 1 - len(self._free) / self.num_blocks

    @property
    def named_blocks(self) -> dict[bytes, int]:
        """Every block whose content is known to the prefix cache, by the hash of what shaped it."""
        return dict(self._cached)

    # Placing: from nothing to a table for all known tokens.

    def match(self, sequence: Sequence) -> list[int]:
        """Cached blocks that hold the sequence's beginning; at least its last token is left to compute."""
        blocks: list[int] = []
        if self._root is None:
            return blocks
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block = self._cached.get(self._hash(sequence, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_place(self, sequence: Sequence, matched: list[int], reserve: int) -> bool:
        """Whether `place` would find enough free blocks and leave `reserve` of them."""
        taken = sum(self.ref_counts[block] == 0 for block in matched)
        needed = -(-sequence.num_tokens // self.block_size) - len(matched)
        return needed + taken + reserve <= len(self._free)

    def place(self, sequence: Sequence, matched: list[int]) -> int:
        """Give a sequence the matched blocks and new ones for the rest; returns the tokens that are already computed."""
        assert not sequence.block_table
        for block in matched:
            self._reference(block)
        sequence.block_table = array("i", matched)
        sequence.num_registered_blocks = len(matched)
        sequence.block_table.extend(self._take() for _ in range(self._num_missing(sequence)))
        return len(matched) * self.block_size

    # Growing: room for the tokens that the next step writes.

    def grow(self, sequence: Sequence) -> bool:
        """Append blocks until the table holds every known token, and make the block that is written next its own; false, with
        nothing changed, where too few blocks are free."""
        num_missing, is_shared = self._num_missing(sequence), self._is_write_shared(sequence)
        if not (num_missing or is_shared):
            return True
        if num_missing + is_shared > len(self._free):
            return False
        sequence.block_table.extend(self._take() for _ in range(num_missing))
        if is_shared:
            self._part(sequence, sequence.num_computed_tokens // self.block_size)
        return True

    def _part(self, sequence: Sequence, index: int) -> None:
        """Give the sequence a copy of its block `index` and leave the shared one to the others."""
        shared, own = sequence.block_table[index], self._take()
        self.copies.append(Copy(shared, own))
        sequence.block_table[index] = own
        self._release(shared)

    def _num_missing(self, sequence: Sequence) -> int:
        return max(0, -(-len(sequence.token_ids) // self.block_size) - len(sequence.block_table))

    def _is_write_shared(self, sequence: Sequence) -> bool:
        """Whether the block of the first uncomputed position also belongs to a sibling."""
        index = sequence.num_computed_tokens // self.block_size
        return index < len(sequence.block_table) and self.ref_counts[sequence.block_table[index]] > 1

    # Sharing and giving back.

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` share all blocks of `parent`; whoever writes into a shared block first gets a copy of it (`grow`)."""
        assert not child.block_table
        for block in parent.block_table:
            self._reference(block)
        child.block_table = parent.block_table[:]
        child.num_registered_blocks = parent.num_registered_blocks

    def free(self, sequence: Sequence) -> None:
        """Drop the sequence's references; its beginning stays cached longest."""
        for block in reversed(sequence.block_table):
            self._release(block)
        sequence.block_table = array("i")
        sequence.num_registered_blocks = 0

    def register(self, sequence: Sequence) -> None:
        """Make the sequence's settled full blocks known to the prefix cache."""
        if self._root is None:
            return
        num_settled = sequence.num_computed_tokens // self.block_size
        if num_settled <= sequence.num_registered_blocks:
            return
        for index in range(sequence.num_registered_blocks, num_settled):
            key, block = self._hash(sequence, index), sequence.block_table[index]
            if key not in self._cached:
                self._cached[key] = block
                self._hashes[block] = key
        sequence.num_registered_blocks = num_settled

    def _reference(self, block: int) -> None:
        if self.ref_counts[block] == 0:
            del self._free[block]
        self.ref_counts[block] += 1

    def _release(self, block: int) -> None:
        self.ref_counts[block] -= 1
        assert self.ref_counts[block] >= 0
        if self.ref_counts[block] == 0:
            self._free[block] = None
            if self._hashes[block] is None:  # nothing to keep: first to be taken
                self._free.move_to_end(block, last=False)

    def _take(self) -> int:
        """The free block unused for longest; what it held is forgotten."""
        block, _ = self._free.popitem(last=False)
        assert self.ref_counts[block] == 0
        key = self._hashes[block]
        if key is not None:
            del self._cached[key]
            self._hashes[block] = None
        self.ref_counts[block] = 1
        return block

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """Chain hash of the sequence's block `index`, whose tokens are all known."""
        while len(sequence.block_hashes) <= index:
            number = len(sequence.block_hashes)
            previous = sequence.block_hashes[-1] if number else f"{self._root}\0{sequence.request.cache_salt or ''}".encode()
            tokens = sequence.token_ids[number * self.block_size : (number + 1) * self.block_size]
            assert len(tokens) == self.block_size
            sequence.block_hashes.append(hashlib.sha256(previous + array("q", tokens).tobytes()).digest())
        return sequence.block_hashes[index]

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Assert that reference counts, free list, hashes and the block tables of all sequences tell the same story, and that
        every slot of a settled position belongs to sequences with the same tokens up to there."""
        tables = list(sequences)
        counts = Counter(block for sequence in tables for block in sequence.block_table)
        for block in range(self.num_blocks):
            assert self.ref_counts[block] == counts[block], f"block {block}: {self.ref_counts[block]} != {counts[block]}"
            assert (block in self._free) == (counts[block] == 0), f"block {block} is both free and in use, or neither"
            key = self._hashes[block]
            assert key is None or self._cached.get(key) == block, f"block {block} has a hash that leads elsewhere"
        assert len(self._free) + len(counts) == self.num_blocks, "a block is lost"
        assert all(self._hashes[block] == key for key, block in self._cached.items()), (
            "the cache names a block of other content"
        )
        for sequence in tables:
            self._check_sequence(sequence)
        self._check_sharing([sequence for sequence in tables if any(counts[block] > 1 for block in sequence.block_table)])

    def _check_sequence(self, sequence: Sequence) -> None:
        num_slots, num_full = len(sequence.block_table) * self.block_size, sequence.num_computed_tokens // self.block_size
        assert sequence.num_computed_tokens <= sequence.num_touched_tokens <= num_slots, "latents without a slot"
        assert sequence.num_computed_tokens <= sequence.num_tokens, "more settled than known"
        assert sequence.num_registered_blocks <= num_full, "more blocks named than are settled"
        assert len(set(sequence.block_table)) == len(sequence.block_table), "a block twice in one table"
        for index, block in enumerate(sequence.block_table):
            key = self._hashes[block]
            assert index <= num_full or self.ref_counts[block] == 1, "a block still to be written is shared"
            assert key is None or index < num_full, "a block still to be written has a name"
            assert key is None or key == self._hash(sequence, index), "a block is registered under other content"

    def _check_sharing(self, sequences: list[Sequence]) -> None:
        """Who shares a block has it at the same place behind the same tokens: keys, values and latents depend on them all."""
        settled: dict[int, tuple[int, bytes, list[int]]] = {}
        for sequence in sequences:
            for index, block in enumerate(sequence.block_table[: -(-sequence.num_computed_tokens // self.block_size)]):
                start = index * self.block_size
                tokens = sequence.token_ids[start : min(start + self.block_size, sequence.num_computed_tokens)]
                before = self._hash(sequence, index - 1) if index else (sequence.request.cache_salt or "").encode()
                known = settled.setdefault(block, (index, before, tokens))
                num_common = min(len(tokens), len(known[2]))
                assert known[:2] == (index, before), "a block is shared behind different tokens"
                assert known[2][:num_common] == tokens[:num_common], "a block is shared for different tokens"
