"""From scheduled windows to one step: what one forward of the model needs.

Python touches a window once, and as little as it can: what runs between two computations finds nothing in the processor's
caches. What belongs to single tokens the step makes itself. Neighbours: `scheduler.py` chooses the windows, `lrt_core/step.py`
says what a step is.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from lrt_core.step import PagedStep
from server.engine.scheduler import ScheduledWindow


def build(windows: Sequence[ScheduledWindow], block_size: int, draws: bool = False) -> tuple[list[ScheduledWindow], PagedStep]:
    """The windows in the order of the step's sequences, and the step. draws: it is to draw the tokens that are due, if every
    sequence's next can be drawn without a look at its logits."""
    ordered = [window for window in windows if window.num_tokens == 1]
    if len(ordered) < len(windows):
        ordered += [window for window in windows if window.num_tokens > 1]
    tokens, sequences, tables, packed = array("q"), array("q"), array("i"), bytearray()
    for sequence, start, num_tokens, _ in ordered:
        if num_tokens == 1:
            tokens.append(sequence.token_ids[start])
        else:
            tokens.extend(sequence.token_ids[start : start + num_tokens])
        table, num_known = sequence.block_table, len(sequence.token_ids)
        num_wanted = num_known - start if num_known < sequence.max_num_tokens else 0
        num_drawn = num_known - sequence.num_prompt_tokens
        sequences.extend((start, num_tokens, sequence.num_touched_tokens, len(table), num_wanted, num_drawn))
        tables += table
        if draws:
            if sequence.draw is None or sequence.siblings:
                draws = False
            else:
                packed += sequence.draw
    return ordered, PagedStep(tokens, sequences, tables, block_size, packed if draws else None)


def slots_of(block_table: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Pool slots of positions start..end - 1."""
    return [block_table[position // block_size] * block_size + position % block_size for position in range(start, end)]
