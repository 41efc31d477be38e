"""The engine under random load with a runner of tokens instead of tensors: what every slot must hold is known exactly.

Arrivals with common beginnings, several samples, priorities and salts; passes that settle what they like; aborts anywhere;
pools so small that sequences are preempted and cached blocks forgotten. `ledger.py` knows what every slot must hold;
`test_scheduler_machine.py` has the rules of rank.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.block_manager import Copy
from server.engine.config import EngineConfig
from server.engine.engine import Engine, SequenceOutput
from server.engine.model_runner import WindowResult
from server.engine.request import TokenLogprob
from server.engine.scheduler import ScheduledWindow, scored_per_row
from server.engine.sequence import Sequence, Status
from tests.engines import engine_config, request
from tests.server.ledger import EOS, STEMS, VOCAB_SIZE, Ledger

MAX_STEPS = 3000


class TokenRunner:
    """Does to slots what the model's runner does, and checks what it is given."""

    def __init__(self, config: EngineConfig, latents_are_hidden: bool) -> None:
        sizes = {"vocab_size": VOCAB_SIZE, "num_layers": 1, "hidden_size": 2, "kv_size": 2, "intermediate_size": 8}
        model_config: Any = SimpleNamespace(latents_are_hidden=latents_are_hidden, **sizes)
        self.scored_per_row = scored_per_row(model_config)
        self.config, self.model = config, SimpleNamespace(dtype=torch.float32, config=model_config)
        self.ledger = Ledger(config.num_blocks, config.block_size)
        self.random = random.Random(0)
        self.num_scoring_rows = 0

    def execute(self, windows: SequenceABC[ScheduledWindow], copies: SequenceABC[Copy] = ()) -> list[WindowResult]:
        size = self.config.block_size
        tables = [(window.sequence.block_table, window.start // size) for window in windows]
        for _, target in copies:
            assert all(table.index(target) == index for table, index in tables if target in table), "copied without need"
        self.ledger.copy(copies)
        computing = [window for window in windows if window.num_tokens]
        self.num_scoring_rows = sum(-(-window.num_scored // self.scored_per_row) for window in windows)
        self.ledger.begin(computing)
        scoring = [self.score(window) for window in windows if not window.num_tokens]
        return [self.settle(window) for window in computing] + scoring

    def check_invariants(self, sequences: SequenceABC[Sequence], named: Mapping[bytes, int]) -> None:
        """The ledger has checked what was written as it was written."""

    def score(self, window: ScheduledWindow) -> WindowResult:
        """Score what the prefix cache has settled."""
        sequence, first = window.sequence, len(window.sequence.prompt_logprobs)
        assert self.model.config.latents_are_hidden, "the cache has no scores"
        assert sequence.num_output_tokens == 0 and window.num_scored > 0
        assert first + window.num_scored <= min(window.start, sequence.num_prompt_tokens - 1)
        scored = [TokenLogprob(sequence.token_ids[first + index + 1], -1.0) for index in range(window.num_scored)]
        return WindowResult(window, 0, None, prompt_logprobs=scored)

    def settle(self, window: ScheduledWindow) -> WindowResult:
        """Settle as many rows as chance has it."""
        sequence, num_settled = window.sequence, self.random.randint(1, window.num_tokens)
        self.ledger.settle(sequence, window.start, num_settled)
        result = WindowResult(window, num_settled, None)
        end = window.start + num_settled
        if sequence.request.prompt_logprobs is not None:
            first, last = len(sequence.prompt_logprobs), sequence.num_prompt_tokens - 1
            assert min(window.start, last) <= first, "the cache's part comes before"
            scored = range(first, min(end, last))
            result.prompt_logprobs = [TokenLogprob(sequence.token_ids[position + 1], -1.0) for position in scored]
        if end == sequence.num_tokens < sequence.max_num_tokens:
            drawn = [self.random.randrange(VOCAB_SIZE) for _ in range(1 + len(sequence.siblings))]
            result.tokens = [TokenLogprob(token, None) for token in drawn]
        return result


class EngineMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps and aborts."""

    @initialize(
        num_blocks=st.integers(5, 20),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 6),
        extra=st.integers(0, 12),
        window=st.integers(1, 9),
        prefix_caching=st.sampled_from([True, True, False]),
        latents_are_hidden=st.booleans(),
    )
    def start(self, max_num_seqs: int, extra: int, latents_are_hidden: bool, **values: Any) -> None:
        config = engine_config(
            max_model_len=values["num_blocks"] * values["block_size"],
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra,
            **values,
        )
        self.runner = TokenRunner(config, latents_are_hidden)
        self.engine = Engine(self.runner, [EOS], check_invariants=True, seed=0)  # type: ignore[arg-type]
        self.scheduler, self.blocks = self.engine.scheduler, self.engine.blocks
        self.sequences: list[Sequence] = []
        self.tokens: dict[Sequence, list[int]] = {}
        self.prompts_scored: set[Sequence] = set()
        self.aborted: set[Sequence] = set()

    @rule(
        stem=st.sampled_from(STEMS),
        stem_length=st.sampled_from([16, 9, 8, 5, 3, 0]),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
        max_tokens=st.integers(0, 10),
        n=st.sampled_from([1, 1, 2, 4]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "salt"]),
    )
    def arrive(
        self,
        stem: list[int],
        stem_length: int,
        own: list[int],
        max_tokens: int,
        n: int,
        prompt_logprobs: int | None,
        priority: int,
        salt: str | None,
    ) -> None:
        capacity = self.engine.config.capacity
        prompt = (stem[:stem_length] + own or [1])[:capacity]
        item = request(
            prompt,
            min(max_tokens, capacity - len(prompt)),
            n=n,
            prompt_logprobs=prompt_logprobs,
            priority=priority,
            cache_salt=salt,
            ignore_eos=priority == 1,
        )
        for sequence in self.engine.add(item):
            self.sequences.append(sequence)
            self.tokens[sequence] = []

    @rule(choice=st.integers(0, 50))
    def abort(self, choice: int) -> None:
        """Mostly nothing, so that few are gone before they could do anything."""
        live = [sequence for sequence in self.sequences if not sequence.finished]
        if choice >= len(live):
            return
        sequence = live[choice]
        self.engine.finish(sequence, "abort")
        self.aborted.add(sequence)
        assert not sequence.block_table

    @rule(seed=st.integers(0, 2**32), num_steps=st.integers(1, 6))
    @precondition(lambda self: self.engine.has_work())
    def work(self, seed: int, num_steps: int) -> None:
        self.runner.random.seed(seed)
        for _ in range(num_steps):
            if self.engine.has_work():
                self.step()

    def step(self) -> None:
        first = self.scheduler.running[:1]
        done = [(sequence, sequence.num_computed_tokens, len(sequence.prompt_logprobs)) for sequence in first]
        output = self.engine.step()
        num_rows = output.stats.num_scheduled_tokens + self.runner.num_scoring_rows
        assert num_rows > 0, "with work there is a window"
        assert num_rows <= self.engine.config.max_num_batched_tokens
        for sequence, computed, scored in done:
            assert sequence.finished or sequence.status is Status.RUNNING, "the first in rank was preempted"
            is_on = sequence.num_computed_tokens > computed or len(sequence.prompt_logprobs) > scored
            assert is_on, "the first in rank gets on"
        for item in output.outputs:
            self.take(item)

    def take(self, item: SequenceOutput) -> None:
        sequence = item.sequence
        assert sequence not in self.aborted, "an output after the end"
        wants_prompt = sequence.request.prompt_logprobs is not None and sequence not in self.prompts_scored
        assert (item.prompt_logprobs is not None) == wants_prompt, "prompt logprobs come once, with the first output"
        if item.prompt_logprobs is not None:
            assert [entry.token_id for entry in item.prompt_logprobs] == list(sequence.request.prompt_ids)
            self.prompts_scored.add(sequence)
        if item.token is not None:
            self.tokens[sequence].append(item.token.token_id)

    @invariant()
    def books_agree(self) -> None:
        running = self.scheduler.running
        self.scheduler.check_invariants()
        used = {block for sequence in running for block in sequence.block_table}
        assert self.blocks.num_free_blocks == self.blocks.num_blocks - len(used), "a block leaked"
        assert not self.blocks.copies or running

    @invariant()
    def everyone_is_in_one_place(self) -> None:
        held = [own for leader in self.sequences for own in leader.siblings if not own.finished]
        assert all(not leader.siblings for leader in self.sequences if leader.finished)
        places = {Status.RUNNING: self.scheduler.running, Status.WAITING: self.scheduler.waiting, Status.HELD: held}
        for sequence in self.sequences:
            found = [status for status, members in places.items() for member in members if member is sequence]
            assert found == ([] if sequence.finished else [sequence.status])
            assert sequence.status is Status.RUNNING or not sequence.block_table
            assert sequence.output_ids == self.tokens[sequence]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(MAX_STEPS):
            if not self.engine.has_work():
                break
            self.step()
        assert self.blocks.num_free_blocks == self.blocks.num_blocks
        for sequence in self.sequences:
            assert sequence.finished, "somebody waits for ever"
            if sequence not in self.aborted:
                self.check_end(sequence)

    def check_end(self, sequence: Sequence) -> None:
        ended = sequence.output_ids[-1:] == [EOS] and not sequence.request.stopping.ignore_eos
        assert sequence.finish_reason == ("stop" if ended else "length")
        assert ended or sequence.num_tokens == sequence.max_num_tokens
        assert (sequence in self.prompts_scored) == (sequence.request.prompt_logprobs is not None)


EngineMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=30)
TestEngineMachine = EngineMachine.TestCase
