"""Which tokens the next step computes. No torch, no clock.

Every running sequence is a window of unsettled positions: one wide when it decodes, wider while its prompt is read. A step
takes every decoding sequence, then prompt windows within the token budget, then admits waiting sequences that fit; all in order
of rank (priority, then arrival). When the pool runs dry the running sequence of the last rank is preempted; it later continues
from what is still cached. So the first in rank always gets on: with every sequence no longer than the pool, all finish.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from lrt_core.config import ModelConfig
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.request import FinishReason
from server.engine.sequence import Sequence, Status


class ScheduledWindow(NamedTuple):
    """`num_tokens` positions of a sequence from its first unsettled one (`start`) on.

    Or none of them yet, and instead logprobs of `num_scored` prompt tokens that the prefix cache had settled.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_scored: int = 0


def scored_per_row(model: ModelConfig) -> int:
    """Cached positions that are scored for a row of the budget: they cost the head alone, and ranking its logits as much."""
    width, kv = model.hidden_size, model.kv_size
    of_layers = model.num_layers * 2 * width * (width + kv + model.intermediate_size)
    return max(1, of_layers // (2 * model.vocab_size * width))


@dataclass
class Totals:
    """Counters since the start, in tokens but for preemptions."""

    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0


class Scheduler:
    """Queues and budget; `running` and `waiting` are in order of rank.

    latents_are_hidden: a token's latent is what the head reads (source layer last), so that cached prompt tokens can be scored
    without a forward, `scored_per_row` of them for a row.
    """

    def __init__(
        self, config: EngineConfig, blocks: BlockManager, latents_are_hidden: bool = False, scored_per_row: int = 1
    ) -> None:
        self.config, self.blocks = config, blocks
        self.latents_are_hidden, self.scored_per_row = latents_are_hidden, scored_per_row
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.totals = Totals()

    @property
    def max_window(self) -> int:
        """Positions of one prompt that a step may compute."""
        return 1 if self.config.prefill == "sequential" else self.config.window

    def has_work(self) -> bool:
        """Whether any sequence runs or waits; held ones depend on one that does."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits the pool alone (the engine has checked)."""
        assert sequence.max_num_tokens <= self.config.capacity
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_rank)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, which has the parent's settled tokens and one of its own, run beside it; without a place, or where one
        of better rank waits for it, it waits too and later starts from what is cached."""
        if len(self.running) >= self.config.max_num_seqs or (self.waiting and self.waiting[0].rank < child.rank):
            self.add(child)
            return
        self.blocks.fork(parent, child)
        child.place(parent.num_computed_tokens, self.max_window)
        self._run(child)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it stands and free its blocks; ending it twice does nothing."""
        if sequence.finished:
            return
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        self.blocks.free(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason

    def schedule(self) -> list[ScheduledWindow]:
        """The next step's windows; makes room by preemption where it must, and then admits nobody in the same step."""
        may_admit = not self._make_room()
        windows: list[ScheduledWindow] = []
        reading = []
        for sequence in self.running:
            if sequence.num_uncomputed_tokens == 1 and not sequence.num_unscored_tokens:
                windows.append(ScheduledWindow(sequence, sequence.num_computed_tokens, 1))
            else:
                reading.append(sequence)
        budget = self.config.max_num_batched_tokens - len(windows)
        if self.config.num_prompt_rows is not None:
            self._share_rows(reading, min(self.config.num_prompt_rows, budget), may_admit, windows)
            return windows
        for sequence in reading:
            budget -= self._schedule_window(sequence, budget, windows)
        while may_admit and budget > 0 and (admitted := self._admit()) is not None:
            budget -= self._schedule_window(admitted, budget, windows)
        return windows

    def _share_rows(self, reading: list[Sequence], num_rows: int, may_admit: bool, windows: list[ScheduledWindow]) -> None:
        """Schedule the prompts that share rows: those of one priority in equal parts, and of what they leave the next ones.

        Who can begin now joins at once, if a row is there for each of its priority: many narrow windows compute a token fewer
        times than a few wide ones.
        """
        while may_admit and self.waiting:
            priority = self.waiting[0].rank[0]
            if sum(sequence.rank[0] <= priority for sequence in reading) >= num_rows or (admitted := self._admit()) is None:
                break
            insort(reading, admitted, key=_rank)
        for _, group in groupby(reading, key=lambda sequence: sequence.rank[0]):
            alike = list(group)
            share = max(1, num_rows // len(alike))
            for sequence in alike:
                num_rows -= self._schedule_window(sequence, min(share, num_rows), windows)

    def _make_room(self) -> bool:
        """Give every running sequence blocks for all its tokens, by rank, preempting the last in rank when none are left.

        Returns whether any was preempted.
        """
        position, num_before = 0, len(self.running)
        while position < len(self.running):
            sequence = self.running[position]
            while not self.blocks.grow(sequence):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            position += 1
        return len(self.running) < num_before

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence)
        self.totals.num_preemptions += 1
        sequence.forget()
        self.add(sequence)

    def _schedule_window(self, sequence: Sequence, budget: int, windows: list[ScheduledWindow]) -> int:
        """Add the sequence's window, of at most `budget` rows; returns how many it takes."""
        assert sequence.window is not None
        if num_unscored := sequence.num_unscored_tokens:
            num_scored = min(num_unscored, self.scored_per_row * min(budget, self.config.window))
            if num_scored > 0:
                windows.append(ScheduledWindow(sequence, sequence.num_computed_tokens, 0, num_scored))
            return -(-num_scored // self.scored_per_row)
        num_tokens = min(sequence.window.width, sequence.num_uncomputed_tokens, budget)
        if num_tokens > 0:
            windows.append(ScheduledWindow(sequence, sequence.num_computed_tokens, num_tokens))
        return num_tokens

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to running if a place and blocks for all its known tokens are there.

        Beside running sequences one block is kept in reserve for each, so that admitting does not preempt at once.
        """
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return None
        sequence = self.waiting[0]
        matched = self.blocks.match(sequence) if self._may_share(sequence) else []
        if not self.blocks.can_place(sequence, matched, reserve=len(self.running)):
            return None
        self.waiting.pop(0)
        self._place(sequence, matched)
        return sequence

    def _place(self, sequence: Sequence, matched: list[int]) -> None:
        is_new = sequence.num_cached_prompt_tokens is None
        num_cached = self.blocks.place(sequence, matched)
        sequence.place(num_cached, self.max_window)
        if is_new and self._may_share(sequence):
            self.totals.num_prefix_queries += sequence.num_tokens
            self.totals.num_prefix_hits += num_cached
        self.totals.num_recomputed_tokens += max(0, sequence.num_lost_tokens - num_cached)
        self._run(sequence)

    def _may_share(self, sequence: Sequence) -> bool:
        """A prompt whose logprobs are asked for is computed anew unless cached blocks hold its hidden states."""
        unscored = sequence.request.prompt_logprobs is not None and sequence.num_output_tokens == 0
        return self.config.prefix_caching and (self.latents_are_hidden or not unscored)

    def _run(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_rank)

    def check_invariants(self) -> None:
        """Assert, between two steps, that queues, statuses and blocks agree. A failure is a bug: AssertionError."""
        for queue, status in ((self.running, Status.RUNNING), (self.waiting, Status.WAITING)):
            assert all(sequence.status is status for sequence in queue), "a sequence stands in the wrong queue"
            ranks = [sequence.rank for sequence in queue]
            assert ranks == sorted(ranks), "a queue is out of order"
        everyone = [*self.running, *self.waiting]
        assert len(set(everyone)) == len(everyone), "a sequence is queued twice"
        assert len(self.running) <= self.config.max_num_seqs, "more run than may"
        for sequence in self.waiting:
            assert not sequence.block_table and not sequence.num_touched_tokens, "a waiting sequence holds blocks"
        for sequence in everyone:
            assert sequence.num_uncomputed_tokens > 0, "a sequence has nothing left to compute"
            assert len(sequence.prompt_logprobs) < sequence.num_prompt_tokens, "a prompt token was scored twice"
            assert all(sibling.status in (Status.HELD, Status.FINISHED) for sibling in sequence.siblings), "a held sample runs"
        self.blocks.check_invariants(everyone)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
