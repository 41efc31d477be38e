"""What every slot of a pool must hold, known exactly: tokens in the place of tensors. No torch.

A slot's keys, values and latent depend on the request's salt and on all tokens up to its own, so that is what the ledger keeps
for it. The state machines (`test_block_machine.py`, `test_scheduler_machine.py`, `test_engine_machine.py`) write it as the
model's runner writes the pool, and it fails when a sequence is about to read a slot that holds anything else.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC

from lrt_core.sampling_params import SamplingParams
from server.engine.block_manager import Copy
from server.engine.request import GenerationRequest, StoppingParams
from server.engine.scheduler import ScheduledWindow
from server.engine.sequence import Sequence

VOCAB_SIZE, EOS = 5, 4
STEMS = [[0, 1, 2, 3] * 4, [0, 1, 2, 3, 3, 3] * 3, [2] * 15]
"""Common beginnings; the first two part after four tokens."""

Content = tuple[str | None, tuple[int, ...]]
"""What shaped a slot: the request's salt and all tokens up to the slot's own."""


def make_request(prompt_ids: SequenceABC[int], max_tokens: int, **values: object) -> GenerationRequest:
    """A request for the state machines, whose tokens are drawn by chance whatever the parameters."""
    return GenerationRequest("request", tuple(prompt_ids), SamplingParams(temperature=0), StoppingParams(max_tokens), **values)  # type: ignore[arg-type]


def content(sequence: Sequence, position: int) -> Content:
    """What the slot of a settled position must hold."""
    return sequence.request.cache_salt, tuple(sequence.token_ids[: position + 1])


class Ledger:
    """The content of every slot; None for what never settled."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[Content | None] = [None] * (num_blocks * block_size)

    def slot(self, sequence: Sequence, position: int) -> int:
        """The slot of a sequence's position."""
        return sequence.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def copy(self, copies: Iterable[Copy]) -> None:
        """Carry out copies of whole blocks, in order."""
        size = self.block_size
        for source, target in copies:
            self.slots[target * size : (target + 1) * size] = self.slots[source * size : (source + 1) * size]

    def begin(self, windows: SequenceABC[ScheduledWindow]) -> None:
        """Overwrite the windows' slots, which hold nothing final until they settle; then every sequence must find its past."""
        written = [self.slot(window.sequence, window.start + row) for window in windows for row in range(window.num_tokens)]
        assert len(set(written)) == len(written), "two sequences write one slot"
        for slot in written:
            self.slots[slot] = None
        for window in windows:
            assert window.start == window.sequence.num_computed_tokens
            self.check(window.sequence)

    def check(self, sequence: Sequence) -> None:
        """Every settled position's slot holds what the sequence's tokens make of it."""
        for position in range(sequence.num_computed_tokens):
            held = self.slots[self.slot(sequence, position)]
            assert held is not None, f"position {position} reads what never settled"
            assert held == content(sequence, position), f"position {position} reads what other tokens made"

    def settle(self, sequence: Sequence, start: int, num_settled: int) -> None:
        """Positions from `start` on are final."""
        for position in range(start, start + num_settled):
            self.slots[self.slot(sequence, position)] = content(sequence, position)
