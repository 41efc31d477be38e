"""Scheduler and block manager under random load with chance in the place of a model: no rule of rank is broken, the counters
are exact, nothing leaks, and everyone comes to an end within a bounded number of steps. No torch.

`Load` does with a step's windows what the engine does; `ledger.py` knows what every slot must hold.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.request import TokenLogprob
from server.engine.scheduler import ScheduledWindow, Scheduler, Totals
from server.engine.sequence import Sequence, Status
from tests.server.ledger import EOS, STEMS, VOCAB_SIZE, Ledger, make_request


@dataclass
class Before:
    """What a step started from."""

    running: list[Sequence]
    waiting: list[Sequence]
    computed: dict[Sequence, int]
    """Settled tokens of those that run."""
    lost: dict[Sequence, int]
    """What those that wait lost when they were preempted."""
    newcomers: set[Sequence]


@dataclass
class Load:
    """A scheduler, the pool it manages, and everyone who ever came."""

    config: EngineConfig
    latents_are_hidden: bool
    random: random.Random = field(default_factory=lambda: random.Random(0))
    everyone: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        root = "root" if self.config.prefix_caching else None
        self.blocks = BlockManager(self.config.num_blocks, self.config.block_size, root)
        self.scheduler = Scheduler(self.config, self.blocks, self.latents_are_hidden)
        self.ledger = Ledger(self.config.num_blocks, self.config.block_size)
        self.numbers = itertools.count()
        self.expected = Totals()

    def arrive(self, prompt: list[int], max_tokens: int, **values: Any) -> None:
        item = make_request(prompt, max_tokens, **values)
        samples = [Sequence(item, index, index, next(self.numbers)) for index in range(item.n)]
        self.everyone += samples
        self.lead(samples)

    def lead(self, samples: list[Sequence]) -> None:
        """The first reads the prompt, the others are held."""
        if samples:
            leader, *leader.siblings = samples
            for sibling in leader.siblings:
                sibling.status = Status.HELD
            self.scheduler.add(leader)

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence, "abort")
        siblings, sequence.siblings = sequence.siblings, []
        self.lead([sibling for sibling in siblings if not sibling.finished])

    def unfinished(self) -> list[Sequence]:
        return [sequence for sequence in self.everyone if not sequence.finished]

    # A step and what must hold of it.

    def step(self) -> None:
        before = self.before()
        windows = self.scheduler.schedule()
        first = self.scheduler.running[:1]
        self.check_ranks(before)
        self.check_windows(before, windows)
        self.check_totals(before)
        copies, self.blocks.copies = self.blocks.copies, []
        self.ledger.copy(copies)
        self.ledger.begin(windows)
        for window in windows:
            self.settle(window)
        windows_of = {window.sequence: window for window in windows}
        for sequence in first:
            window = windows_of[sequence]
            assert sequence.num_computed_tokens > window.start or window.num_scored, "the first in rank gets on"

    def before(self) -> Before:
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        return Before(
            running,
            waiting,
            {sequence: sequence.num_computed_tokens for sequence in running},
            {sequence: sequence.num_lost_tokens for sequence in waiting},
            {sequence for sequence in waiting if sequence.num_cached_prompt_tokens is None},
        )

    def check_ranks(self, before: Before) -> None:
        """Who was preempted ranks behind all who stayed, who was admitted before all who wait."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        num_stayed = sum(sequence.status is Status.RUNNING for sequence in before.running)
        assert [s for s in running if s in before.computed] == before.running[:num_stayed], "not the last gave way"
        assert num_stayed > 0 or not before.running, "the first in rank gave way"
        admitted = [sequence for sequence in running if sequence not in before.computed]
        assert admitted == before.waiting[: len(admitted)], "somebody overtook"
        if num_stayed < len(before.running):
            assert not admitted, "admitted where others had just to give way"
        elif waiting and len(running) < self.config.max_num_seqs and not self.is_budget_spent(before):
            head = waiting[0]
            matched = self.blocks.match(head) if self.may_share(head) else []
            assert not self.blocks.can_place(head, matched, reserve=len(running)), "there was room for the first in the queue"

    def is_budget_spent(self, before: Before) -> bool:
        """Whether no row is left for a prompt that waits."""
        decoding, reading = self.parted(before)
        budget, num_rows = self.config.max_num_batched_tokens - len(decoding), self.config.num_prompt_rows
        if num_rows is None:
            return sum(self.wanted(sequence) for sequence in reading) >= budget
        priority = self.scheduler.waiting[0].rank[0]
        return sum(sequence.rank[0] <= priority for sequence in reading) >= min(num_rows, budget)

    def parted(self, before: Before) -> tuple[list[Sequence], list[Sequence]]:
        """Those that decode, and the prompts in the order in which they are served: newcomers last."""
        stayed = [sequence for sequence in self.scheduler.running if sequence in before.computed]
        newcomers = [sequence for sequence in self.scheduler.running if sequence not in before.computed]
        decoding = [one for one in stayed if one.num_uncomputed_tokens == 1 and not one.num_unscored_tokens]
        reading = [sequence for sequence in stayed if sequence not in decoding] + newcomers
        return decoding, reading if self.config.num_prompt_rows is None else sorted(reading, key=lambda one: one.rank)

    def wanted(self, sequence: Sequence) -> int:
        """Rows, a part of one for a cached position that waits for its logprob."""
        assert sequence.window is not None
        if sequence.num_unscored_tokens:
            return min(self.config.window, -(-sequence.num_unscored_tokens // self.scheduler.scored_per_row))
        return min(sequence.window.width, sequence.num_uncomputed_tokens)

    def may_share(self, sequence: Sequence) -> bool:
        needs_hidden = sequence.request.prompt_logprobs is not None and not sequence.num_output_tokens
        return self.config.prefix_caching and (self.latents_are_hidden or not needs_hidden)

    def check_windows(self, before: Before, windows: list[ScheduledWindow]) -> None:
        """Every decoding sequence has its row; then come windows, by rank, until the budget is spent; then newcomers.

        Prompts of one priority that share rows have equal parts of what those of better ones have left."""
        running = self.scheduler.running
        decoding, reading = self.parted(before)
        budget, num_rows = self.config.max_num_batched_tokens - len(decoding), self.config.num_prompt_rows
        expected = dict.fromkeys(decoding, 1)
        budget = budget if num_rows is None else min(budget, num_rows)
        parts: dict[int, int] = {}
        for sequence in reading:
            priority = sequence.rank[0]
            num_alike = sum(one.rank[0] == priority for one in reading)
            part = budget if num_rows is None else parts.setdefault(priority, max(1, budget // num_alike))
            expected[sequence] = min(self.wanted(sequence), part, budget)
            budget -= expected[sequence]
        for window in windows:
            unscored, rows = window.sequence.num_unscored_tokens, expected[window.sequence]
            assert window.num_scored == min(unscored, self.scheduler.scored_per_row * rows)
            assert not (window.num_tokens and unscored), "what is cached is scored before the rest is computed"
        scheduled = {
            window.sequence: window.num_tokens or -(-window.num_scored // self.scheduler.scored_per_row) for window in windows
        }
        assert len(scheduled) == len(windows)
        assert scheduled == {sequence: count for sequence, count in expected.items() if count > 0}
        assert all(sequence in scheduled for sequence in decoding), "a decoding sequence was left out"
        for sequence in running:
            assert len(sequence.block_table) == -(-sequence.num_tokens // self.config.block_size)

    def check_totals(self, before: Before) -> None:
        expected, running = self.expected, self.scheduler.running
        preempted = [sequence for sequence in before.running if sequence.status is Status.WAITING]
        placed = [sequence for sequence in running if sequence in before.lost]
        looked = [sequence for sequence in placed if sequence in before.newcomers and self.may_share(sequence)]
        expected.num_preemptions += len(preempted)
        expected.num_recomputed_tokens += sum(max(0, before.lost[s] - s.num_cached_tokens) for s in placed)
        expected.num_prefix_queries += sum(sequence.num_prompt_tokens for sequence in looked)
        expected.num_prefix_hits += sum(sequence.num_cached_tokens for sequence in looked)
        assert self.scheduler.totals == expected
        for sequence in preempted:
            assert sequence.num_lost_tokens == before.computed[sequence]

    def settle(self, window: ScheduledWindow) -> None:
        """As many rows as chance has it; behind the last one a token, and the siblings set out."""
        sequence = window.sequence
        if not window.num_tokens:
            sequence.prompt_logprobs += [TokenLogprob(0, -1.0)] * window.num_scored
            return
        num_settled = self.random.randint(1, window.num_tokens)
        self.ledger.settle(sequence, window.start, num_settled)
        sequence.advance(num_settled, window.num_tokens)
        if sequence.request.prompt_logprobs is not None:
            sequence.prompt_logprobs += [TokenLogprob(0, -1.0)] * sequence.num_unscored_tokens
        self.blocks.register(sequence)
        if sequence.num_uncomputed_tokens > 0:
            return
        siblings, sequence.siblings = [sibling for sibling in sequence.siblings if not sibling.finished], []
        wants_more = sequence.num_tokens < sequence.max_num_tokens
        for sample in (sequence, *siblings):
            sample.token_ids += [self.random.randrange(VOCAB_SIZE)] if wants_more else []
        for sibling in siblings:
            sibling.num_cached_prompt_tokens = sequence.num_cached_prompt_tokens
            if not self.is_over(sibling):
                self.fork(sequence, sibling)
        for sample in (sequence, *siblings):
            if self.is_over(sample):
                self.scheduler.finish(sample, "stop")

    def fork(self, parent: Sequence, child: Sequence) -> None:
        better = [sequence for sequence in self.scheduler.waiting if sequence.rank < child.rank]
        num_free = self.blocks.num_free_blocks
        self.scheduler.fork(parent, child)
        assert child.status is Status.WAITING or not better, "a sample went ahead of a request of better rank"
        assert self.blocks.num_free_blocks == num_free, "a fork takes nothing"

    def is_over(self, sequence: Sequence) -> bool:
        ended = sequence.num_output_tokens > 0 and sequence.token_ids[-1] == EOS
        return ended or sequence.num_tokens >= sequence.max_num_tokens

    def drain(self) -> None:
        """Without arrivals the first in rank is never set back, and each of the others at most once before it is the first."""
        most = 2 * sum(sequence.max_num_tokens for sequence in self.unfinished())
        for _ in range(most):
            if self.scheduler.has_work():
                self.step()
        assert not self.unfinished(), "somebody starves"
        assert self.blocks.num_free_blocks == self.blocks.num_blocks, "a block leaked"
        self.scheduler.check_invariants()


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, aborts and steps."""

    @initialize(
        num_blocks=st.integers(4, 20),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 6),
        extra=st.integers(0, 12),
        window=st.integers(1, 9),
        num_prompt_rows=st.sampled_from([None, None, 1, 5]),
        prefill=st.sampled_from(["window", "window", "sequential"]),
        prefix_caching=st.sampled_from([True, True, False]),
        latents_are_hidden=st.booleans(),
    )
    def start(self, max_num_seqs: int, extra: int, latents_are_hidden: bool, **values: Any) -> None:
        longest = values["num_blocks"] * values["block_size"]
        config = EngineConfig(
            max_model_len=longest, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + extra, **values
        )
        self.load = Load(config, latents_are_hidden)

    @rule(
        stem=st.sampled_from(STEMS),
        stem_length=st.sampled_from([16, 9, 8, 5, 3, 0]),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
        max_tokens=st.integers(0, 10),
        fills_the_pool=st.sampled_from([False, False, False, True]),
        n=st.sampled_from([1, 1, 2, 4]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "salt"]),
    )
    def arrive(self, stem: list[int], stem_length: int, own: list[int], max_tokens: int, **values: Any) -> None:
        capacity, fills_the_pool = self.load.config.capacity, values.pop("fills_the_pool")
        prompt = (stem[:stem_length] + own or [1])[:capacity]
        room = capacity - len(prompt)
        self.load.arrive(prompt, room if fills_the_pool else min(max_tokens, room), cache_salt=values.pop("salt"), **values)

    @rule(choice=st.integers(0, 30))
    def abort(self, choice: int) -> None:
        """Mostly nothing, so that few are gone before they could do anything."""
        live = self.load.unfinished()
        if choice < len(live):
            self.load.abort(live[choice])
            assert not live[choice].block_table

    @rule(seed=st.integers(0, 2**32), num_steps=st.integers(1, 6))
    @precondition(lambda self: self.load.scheduler.has_work())
    def work(self, seed: int, num_steps: int) -> None:
        self.load.random.seed(seed)
        for _ in range(num_steps):
            if self.load.scheduler.has_work():
                self.load.step()
                self.books_agree()

    @invariant()
    def books_agree(self) -> None:
        scheduler = self.load.scheduler
        scheduler.check_invariants()
        leaders = [*scheduler.running, *scheduler.waiting]
        held = [sibling for leader in leaders for sibling in leader.siblings if not sibling.finished]
        assert {*leaders, *held} == set(self.load.unfinished()), "somebody was forgotten"

    def teardown(self) -> None:
        if hasattr(self, "load"):
            self.load.drain()


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestSchedulerMachine = SchedulerMachine.TestCase
