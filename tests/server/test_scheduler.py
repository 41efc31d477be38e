"""Queues, budget and preemption, without a model: a step's result is made up."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.scheduler import ScheduledWindow, Scheduler
from server.engine.sequence import Sequence, Status
from tests.engines import engine_config, request

NUMBERS = itertools.count()


def make_scheduler(**overrides: Any) -> Scheduler:
    config = engine_config(**overrides)
    return Scheduler(config, BlockManager(config.num_blocks, config.block_size))


def add(scheduler: Scheduler, num_prompt_tokens: int, max_tokens: int = 8, priority: int = 0) -> Sequence:
    sequence = Sequence(request([1] * num_prompt_tokens, max_tokens, priority=priority), 0, 0, next(NUMBERS))
    scheduler.add(sequence)
    return sequence


def settle(scheduler: Scheduler, window: ScheduledWindow, num_settled: int) -> None:
    """What the engine does with a window's result, an end by length included."""
    sequence = window.sequence
    sequence.advance(num_settled, window.num_tokens)
    if sequence.num_uncomputed_tokens == 0:
        if sequence.num_tokens < sequence.max_num_tokens:
            sequence.token_ids.append(2)
        if sequence.num_tokens >= sequence.max_num_tokens:
            scheduler.finish(sequence, "length")


def step(scheduler: Scheduler) -> list[tuple[Sequence, int, int]]:
    """Schedule, settle everything; returns (sequence, start, num_tokens) per window."""
    windows = scheduler.schedule()
    for window in windows:
        settle(scheduler, window, window.num_tokens)
    return [(window.sequence, window.start, window.num_tokens) for window in windows]


def test_a_prompt_is_read_in_windows_then_decoded() -> None:
    scheduler = make_scheduler(window=16)
    sequence = add(scheduler, 35, max_tokens=3)
    widths = []
    while scheduler.has_work():
        widths += [(start, count) for _, start, count in step(scheduler)]
    assert widths == [(0, 16), (16, 16), (32, 3), (35, 1), (36, 1)]
    assert sequence.status is Status.FINISHED


def test_sequential_reading_takes_one_token_a_step() -> None:
    scheduler = make_scheduler(prefill="sequential")
    add(scheduler, 5, max_tokens=1)
    assert [step(scheduler)[0][1:] for _ in range(5)] == [(position, 1) for position in range(5)]
    assert not scheduler.has_work()


def test_decoding_goes_first_and_windows_share_the_rest() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20, window=16, max_num_seqs=4)
    decoding = add(scheduler, 1)
    step(scheduler)
    first, second, third = (add(scheduler, 40) for _ in range(3))
    assert step(scheduler) == [(decoding, 1, 1), (first, 0, 16), (second, 0, 3)]
    assert third.status is Status.WAITING
    assert step(scheduler) == [(decoding, 2, 1), (first, 16, 16), (second, 3, 3)]


def test_prompts_share_their_rows_where_these_are_dear() -> None:
    scheduler = make_scheduler(window=8, num_prompt_rows=8, max_num_seqs=12)
    decoding, alone = add(scheduler, 1, 40), add(scheduler, 20)
    step(scheduler)
    assert step(scheduler) == [(decoding, 1, 1), (alone, 4, 8)]
    others = [add(scheduler, 30) for _ in range(3)]
    assert step(scheduler) == [(decoding, 2, 1), (alone, 12, 2), *((other, 0, 2) for other in others)]
    more = [add(scheduler, 30) for _ in range(7)]
    widths = [(sequence, count) for sequence, _, count in step(scheduler)]
    assert widths == [(decoding, 1), (alone, 1), *((other, 1) for other in (*others, *more[:4]))], "eight read, one row each"
    assert more[4].status is Status.WAITING


def test_an_urgent_prompt_takes_the_shared_rows_at_once() -> None:
    scheduler = make_scheduler(window=8, num_prompt_rows=8, max_num_seqs=20, num_blocks=200)
    slow = [add(scheduler, 30, priority=5) for _ in range(9)]
    assert [count for _, _, count in step(scheduler)] == [1] * 8
    urgent = [add(scheduler, 12, priority=-5) for _ in range(2)]
    assert step(scheduler) == [(urgent[0], 0, 4), (urgent[1], 0, 4)]
    scheduler.finish(urgent[1], "abort")
    assert step(scheduler) == [(urgent[0], 4, 8)]
    assert step(scheduler)[0] == (urgent[0], 12, 1), "decodes"
    assert [sequence for sequence, _, _ in step(scheduler)] == [urgent[0], *slow[:8]], "the others go on where they stood"
    urgent.append(add(scheduler, 3, priority=-5))
    assert step(scheduler)[1:] == [(urgent[2], 0, 3), *((sequence, 3, 1) for sequence in slow[:5])], "and take what is left"


def test_an_unsettled_window_starts_again_behind_what_settled() -> None:
    scheduler = make_scheduler(window=8)
    add(scheduler, 30)
    [window] = scheduler.schedule()
    settle(scheduler, window, 3)
    [window] = scheduler.schedule()
    assert (window.start, window.num_tokens) == (3, 8)
    assert window.sequence.num_touched_tokens == 8
    assert window.sequence.num_computed_rows == 8


def test_no_more_run_than_may() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    sequences = [add(scheduler, 2, max_tokens=2) for _ in range(3)]
    assert [sequence for sequence, _, _ in step(scheduler)] == sequences[:2]
    assert [sequence for sequence, _, _ in step(scheduler)] == sequences[:2]
    assert [sequence for sequence, _, _ in step(scheduler)] == sequences[2:]


def test_admission_leaves_running_sequences_a_block() -> None:
    """5 blocks: the first takes 2 and needs a third soon, so of the 3 free ones the second may not take all."""
    scheduler = make_scheduler(num_blocks=5, block_size=4, max_model_len=20)
    first = add(scheduler, 8, max_tokens=12)
    second = add(scheduler, 12, max_tokens=8)
    step(scheduler)
    assert (first.status, second.status) == (Status.RUNNING, Status.WAITING)


def test_the_newest_gives_way_and_comes_back() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_model_len=16)
    first, second = add(scheduler, 4, max_tokens=12), add(scheduler, 3, max_tokens=9)
    while not scheduler.totals.num_preemptions:
        step(scheduler)
    assert scheduler.running == [first]
    assert scheduler.waiting == [second]
    assert not second.block_table
    assert (second.num_computed_tokens, second.num_touched_tokens, second.num_computed_rows) == (0, 0, 0)
    assert second.num_output_tokens > 0, "what was generated is kept"
    assert second.num_lost_tokens > 3
    assert scheduler.totals.num_recomputed_tokens == 0, "not yet"
    while scheduler.has_work():
        step(scheduler)
    assert scheduler.totals.num_recomputed_tokens == second.num_lost_tokens
    assert len(second.token_ids) == 12


def test_a_preempted_sequence_comes_back_before_newer_ones() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_model_len=16, max_num_seqs=2)
    add(scheduler, 4, max_tokens=12)
    second, third = add(scheduler, 3, max_tokens=9), add(scheduler, 1, max_tokens=1)
    while not scheduler.totals.num_preemptions:
        step(scheduler)
    assert scheduler.waiting == [second, third]


def test_lower_priority_values_are_admitted_first() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running = add(scheduler, 2, max_tokens=2, priority=9)
    step(scheduler)
    late, first, second, third = (add(scheduler, 2, max_tokens=1, priority=priority) for priority in (5, 0, -1, 0))
    assert scheduler.waiting == [second, first, third, late], "equal ones by arrival"
    order = []
    while scheduler.has_work():
        order += [sequence for sequence, _, _ in step(scheduler)]
    assert order == [running, second, first, third, late], "what runs is not driven out for want of a place"


def test_the_last_in_priority_gives_way_first_whoever_came_first() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_model_len=16)
    unimportant = add(scheduler, 3, max_tokens=9, priority=1)
    step(scheduler)
    important = add(scheduler, 4, max_tokens=12)
    while not scheduler.totals.num_preemptions:
        step(scheduler)
    assert (scheduler.running, scheduler.waiting) == ([important], [unimportant])
    while scheduler.has_work():
        step(scheduler)
    assert (important.num_tokens, unimportant.num_tokens) == (16, 12)


def test_prompts_of_higher_priority_take_the_budget_first() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20, window=16)
    unimportant = add(scheduler, 40, priority=1)
    step(scheduler)
    important = add(scheduler, 40)
    step(scheduler)
    assert step(scheduler) == [(important, 4, 16), (unimportant, 32, 4)]


def test_ending_from_outside_frees_wherever_it_stands() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = add(scheduler, 8), add(scheduler, 8)
    step(scheduler)
    for sequence in (waiting, running, running):
        scheduler.finish(sequence, "abort")
    assert not scheduler.has_work()
    assert scheduler.blocks.num_free_blocks == scheduler.config.num_blocks
    scheduler.finish(running, "stop")
    assert running.finish_reason == "abort", "the first end counts"


@dataclass
class Simulation:
    """A scheduler under random load, every rule checked at every step."""

    config: EngineConfig
    arrivals: list[tuple[int, int]]
    scheduler: Scheduler = field(init=False)
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config, BlockManager(self.config.num_blocks, self.config.block_size))

    def arrive(self) -> None:
        num_prompt, max_tokens = self.arrivals.pop()
        num_prompt = min(num_prompt, self.config.capacity)
        self.sequences.append(add(self.scheduler, num_prompt, min(max_tokens, self.config.capacity - num_prompt)))

    def step(self, data: st.DataObject) -> None:
        scheduler = self.scheduler
        oldest = scheduler.running[:1]
        before = [(sequence, sequence.num_computed_tokens) for sequence in scheduler.running]
        returning = {id(sequence): sequence.num_lost_tokens for sequence in scheduler.waiting}
        counted = replace(scheduler.totals)
        windows = scheduler.schedule()
        lost = [computed for sequence, computed in before if sequence.num_computed_tokens < computed]
        returned = [returning.get(id(sequence), 0) for sequence in scheduler.running]
        assert scheduler.running[:1] == oldest or not oldest, "the oldest is never preempted"
        assert scheduler.totals.num_recomputed_tokens - counted.num_recomputed_tokens == sum(returned)
        assert scheduler.totals.num_preemptions - counted.num_preemptions >= len(lost)
        self.check(windows)
        for window in windows:
            settle(scheduler, window, data.draw(st.integers(1, window.num_tokens)))
        scheduler.blocks.check_invariants([*scheduler.running, *scheduler.waiting])

    def check(self, windows: list[ScheduledWindow]) -> None:
        scheduler, config = self.scheduler, self.config
        assert windows, "with work there is a window"
        assert sum(window.num_tokens for window in windows) <= config.max_num_batched_tokens
        assert len(scheduler.running) <= config.max_num_seqs
        assert len({id(window.sequence) for window in windows}) == len(windows)
        for window in windows:
            sequence = window.sequence
            assert window.start == sequence.num_computed_tokens
            assert 1 <= window.num_tokens <= min(scheduler.max_window, sequence.num_uncomputed_tokens)
            assert len(sequence.block_table) * config.block_size >= sequence.num_tokens
        scheduled = {id(window.sequence) for window in windows}
        assert id(scheduler.running[0]) in scheduled, "the oldest gets on"
        assert all(id(s) in scheduled for s in scheduler.running if s.num_uncomputed_tokens == 1)
        order = [self.sequences.index(sequence) for sequence in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order), "nobody overtakes"
        assert all(not sequence.block_table for sequence in scheduler.waiting)


configs = st.builds(
    lambda blocks, size, seqs, extra, window, mode, rows: engine_config(
        max_model_len=blocks * size,
        num_blocks=blocks,
        block_size=size,
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + extra,
        window=window,
        prefill=mode,
        num_prompt_rows=rows,
    ),
    st.integers(1, 10),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(1, 9),
    st.sampled_from(["window", "sequential"]),
    st.sampled_from([None, 1, 4, 9]),
)


@settings(max_examples=80)
@given(configs, st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12)), max_size=8), st.data())
def test_any_load_ends_and_breaks_no_rule(config: EngineConfig, arrivals: list[tuple[int, int]], data: st.DataObject) -> None:
    simulation = Simulation(config, arrivals)
    scheduler = simulation.scheduler
    num_steps, aborted = 0, set()
    while arrivals or scheduler.has_work():
        if arrivals and (not scheduler.has_work() or data.draw(st.integers(0, 3)) == 0):
            simulation.arrive()
        if data.draw(st.integers(0, 19)) == 0:
            victim = data.draw(st.sampled_from(simulation.sequences))
            aborted |= {id(victim)} if not victim.finished else set()
            scheduler.finish(victim, "abort")
        if scheduler.has_work():
            simulation.step(data)
        num_steps += 1
        assert num_steps < 4000, "nobody waits for ever"
    assert scheduler.blocks.num_free_blocks == config.num_blocks
    for sequence in simulation.sequences:
        assert sequence.finished
        if id(sequence) not in aborted:
            assert sequence.num_tokens == sequence.max_num_tokens
