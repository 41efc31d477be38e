"""The block manager against a model of it: any order of placing, growing, settling, forking and freeing. No torch.

The model knows which block holds which beginning and when it was last let go, and so predicts what a prompt finds, what fits,
and which cached beginning is forgotten first; `ledger.py` knows what every slot must hold.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.block_manager import BlockManager
from server.engine.scheduler import ScheduledWindow
from server.engine.sequence import Sequence
from tests.server.ledger import STEMS, VOCAB_SIZE, Content, Ledger, content, make_request

MAX_TOKENS = 100
CHOICES = st.integers(0, 11)


class BlockMachine(RuleBasedStateMachine):
    """`named`: blocks that hold a finished beginning, found again until they are taken; `released`: when each was let go."""

    @initialize(num_blocks=st.integers(3, 14), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.blocks, self.ledger = BlockManager(num_blocks, block_size, "root"), Ledger(num_blocks, block_size)
        self.size = block_size
        self.placed: list[Sequence] = []
        self.displaced: list[Sequence] = []
        self.named: dict[int, Content] = {}
        self.released: dict[int, int] = {}
        self.clock = 0

    # What the model predicts.

    def free_blocks(self) -> set[int]:
        return set(range(self.blocks.num_blocks)) - {block for sequence in self.placed for block in sequence.block_table}

    def found(self, sequence: Sequence) -> list[int]:
        """Blocks with the sequence's beginning, as far as it is known without a gap and short of its last token."""
        places = {held: block for block, held in self.named.items()}
        found: list[int] = []
        for end in range(self.size, sequence.num_tokens, self.size):
            block = places.get(content(sequence, end - 1))
            if block is None:
                break
            found.append(block)
        return found

    def take(self, taken: set[int], free: set[int]) -> None:
        """`taken` of the `free` blocks went: nameless ones first, then those let go longest ago."""
        assert taken <= free, "a block in use was taken"
        nameless = free - self.named.keys()
        forgotten = taken & self.named.keys()
        num_forgotten = max(0, len(taken) - len(nameless))
        assert forgotten == set(sorted(free & self.named.keys(), key=self.released.__getitem__)[:num_forgotten])
        for block in forgotten:
            del self.named[block]

    def release(self, sequence: Sequence) -> None:
        """The ends of a sequence are let go before its beginning."""
        self.placed.remove(sequence)
        used = {block for other in self.placed for block in other.block_table}
        for block in reversed(sequence.block_table):
            if block not in used:
                self.clock += 1
                self.released[block] = self.clock

    # What may happen.

    def place(self, sequence: Sequence, reserve: int) -> bool:
        matched, free = self.blocks.match(sequence), self.free_blocks()
        assert matched == self.found(sequence)
        num_needed = -(-sequence.num_tokens // self.size) - len(matched)
        fits = num_needed + reserve <= len(free - set(matched))
        assert self.blocks.can_place(sequence, matched, reserve) == fits
        if not fits:
            return False
        num_cached = self.blocks.place(sequence, matched)
        assert num_cached == len(matched) * self.size
        sequence.place(num_cached, window=8)
        assert list(sequence.block_table[: len(matched)]) == matched
        self.take(set(sequence.block_table[len(matched) :]), free - set(matched))
        self.placed.append(sequence)
        return True

    @rule(
        stem=st.sampled_from(STEMS),
        stem_length=st.sampled_from([16, 9, 8, 5, 4, 1]),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
        salt=st.sampled_from([None, None, "salt"]),
        reserve=st.integers(0, 2),
    )
    def arrive(self, stem: list[int], stem_length: int, own: list[int], salt: str | None, reserve: int) -> None:
        self.place(Sequence(make_request(stem[:stem_length] + own, MAX_TOKENS, cache_salt=salt), 0, 0), reserve)

    @rule(choice=CHOICES)
    @precondition(lambda self: self.displaced)
    def come_back(self, choice: int) -> None:
        sequence = self.displaced[choice % len(self.displaced)]
        if self.place(sequence, reserve=0):
            self.displaced.remove(sequence)

    @rule(choice=CHOICES, num_rows=st.integers(1, 8), num_settled=st.integers(1, 8))
    @precondition(lambda self: self.placed)
    def compute(self, choice: int, num_rows: int, num_settled: int) -> None:
        """A pass over some rows, of which some settle; a sequence that has nothing to compute gets a token first."""
        sequence = self.placed[choice % len(self.placed)]
        if sequence.num_uncomputed_tokens == 0:
            sequence.token_ids.append(choice % VOCAB_SIZE)
        if not self.grow(sequence):
            return
        num_rows = min(num_rows, sequence.num_uncomputed_tokens)
        num_settled = min(num_settled, num_rows)
        window = ScheduledWindow(sequence, sequence.num_computed_tokens, num_rows)
        self.ledger.begin([window])
        self.ledger.settle(sequence, window.start, num_settled)
        sequence.advance(num_settled, num_rows)
        self.blocks.register(sequence)
        self.name(sequence, window.start)

    def grow(self, sequence: Sequence) -> bool:
        free, before = self.free_blocks(), list(sequence.block_table)
        index = sequence.num_computed_tokens // self.size
        num_holders = sum(before[index] in other.block_table for other in self.placed) if index < len(before) else 1
        num_needed = -(-sequence.num_tokens // self.size) - len(before) + (num_holders > 1)
        grown = self.blocks.grow(sequence)
        assert grown == (num_needed <= len(free))
        copies, self.blocks.copies = self.blocks.copies, []
        if not grown:
            assert (list(sequence.block_table), copies) == (before, [])
            return False
        taken = set(sequence.block_table) - set(before)
        assert len(taken) == num_needed
        assert [copy.source for copy in copies] == ([before[index]] if num_holders > 1 else [])
        assert [copy.target for copy in copies] == ([sequence.block_table[index]] if num_holders > 1 else [])
        self.take(taken, free)
        self.ledger.copy(copies)
        return True

    def name(self, sequence: Sequence, start: int) -> None:
        """Blocks that this pass filled are found from now on, unless the same beginning was there already."""
        for index in range(start // self.size, sequence.num_computed_tokens // self.size):
            held = content(sequence, (index + 1) * self.size - 1)
            if held not in self.named.values():
                self.named[sequence.block_table[index]] = held

    @rule(choice=CHOICES, token=st.integers(0, VOCAB_SIZE - 1), count=st.integers(1, 3))
    @precondition(lambda self: self.placed)
    def fork(self, choice: int, token: int, count: int) -> None:
        parent = self.placed[choice % len(self.placed)]
        if parent.num_uncomputed_tokens > 0:
            return
        free = self.blocks.num_free_blocks
        for _ in range(count):
            child = Sequence(parent.request, 0, 0)
            child.token_ids = [*parent.token_ids, token]
            self.blocks.fork(parent, child)
            child.place(parent.num_computed_tokens, window=8)
            self.placed.append(child)
        parent.token_ids.append((token + 1) % VOCAB_SIZE)
        assert self.blocks.num_free_blocks == free, "a fork takes nothing"

    @rule(choice=CHOICES, comes_back=st.booleans())
    @precondition(lambda self: self.placed)
    def leave(self, choice: int, comes_back: bool) -> None:
        sequence = self.placed[choice % len(self.placed)]
        self.release(sequence)
        self.blocks.free(sequence)
        assert not sequence.block_table
        if comes_back:
            sequence.forget()
            self.displaced.append(sequence)

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check_invariants([*self.placed, *self.displaced])
        free = self.free_blocks()
        assert self.blocks.num_free_blocks == len(free)
        assert self.blocks.usage == 1 - len(free) / self.blocks.num_blocks
        for sequence in self.placed:
            self.ledger.check(sequence)
        for block, held in self.named.items():
            assert self.ledger.slots[(block + 1) * self.size - 1] == held, "a cached block was written to"

    def teardown(self) -> None:
        if not hasattr(self, "blocks"):
            return
        while self.placed:
            self.leave(len(self.placed) - 1, False)
        self.books_agree()
        assert self.blocks.usage == 0
        for salt, tokens in [*self.named.values()]:
            probe = Sequence(make_request([*tokens, 0], 1, cache_salt=salt), 0, 0)
            assert self.blocks.match(probe) == self.found(probe)
        assert self.place(Sequence(make_request([0] * len(self.ledger.slots), 0), 0, 0), reserve=0), "all is there for one"


BlockMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestBlockMachine = BlockMachine.TestCase
