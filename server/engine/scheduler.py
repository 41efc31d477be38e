"""Which tokens the next step computes. No torch, no clock.

Every running sequence is a window of unsettled positions: one wide when it decodes, up to `config.window` while its prompt is
read. A step takes every decoding sequence, then prompt windows, oldest first, within the token budget; then it admits waiting
sequences that fit. When the pool runs dry the newest running sequence is preempted and later recomputed, so the oldest always
gets on: with every sequence no longer than the pool, all finish.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.request import FinishReason
from server.engine.sequence import Sequence, Status


@dataclass(frozen=True)
class ScheduledWindow:
    """`num_tokens` positions of a sequence from its first unsettled one (`start`) on."""

    sequence: Sequence
    start: int
    num_tokens: int


class Scheduler:
    """Queues and budget. `running` is ordered by admission, oldest first; `waiting` by arrival, preempted ones in front."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.config, self.blocks = config, blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0

    @property
    def window(self) -> int:
        """Positions of one prompt that a step may compute."""
        return 1 if self.config.prefill == "sequential" else self.config.window

    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits the pool alone (the engine has checked)."""
        assert sequence.max_num_tokens <= self.config.capacity
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it stands and free its blocks; ending it twice does nothing."""
        if sequence.finished:
            return
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        self.blocks.free(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason

    def schedule(self) -> list[ScheduledWindow]:
        """The next step's windows, decoding sequences first; makes room by preemption where it must."""
        self._make_room()
        decoding = [sequence for sequence in self.running if sequence.num_uncomputed_tokens == 1]
        reading = [sequence for sequence in self.running if sequence.num_uncomputed_tokens > 1]
        windows = [ScheduledWindow(sequence, sequence.num_computed_tokens, 1) for sequence in decoding]
        budget = self.config.max_num_batched_tokens - len(windows)
        for sequence in reading:
            budget -= self._schedule_window(sequence, budget, windows)
        while budget > 0 and (admitted := self._admit()) is not None:
            budget -= self._schedule_window(admitted, budget, windows)
        return windows

    def _make_room(self) -> None:
        """Give every running sequence blocks for all its tokens, oldest first, preempting the newest when none are left."""
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            while not self.blocks.can_grow(sequence, sequence.num_tokens):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                self.blocks.grow(sequence, sequence.num_tokens)
            position += 1

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence)
        self.num_preemptions += 1
        self.num_recomputed_tokens += sequence.num_computed_tokens
        sequence.forget()
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)

    def _schedule_window(self, sequence: Sequence, budget: int, windows: list[ScheduledWindow]) -> int:
        num_tokens = min(self.window, sequence.num_uncomputed_tokens, budget)
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
        needed = self.blocks.num_missing_blocks(sequence, sequence.num_tokens)
        if needed + len(self.running) > self.blocks.num_free_blocks and self.running:
            return None
        self.waiting.popleft()
        self.blocks.grow(sequence, sequence.num_tokens)
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return sequence
