"""`lrt-bench scheduler`: what the engine does in a step besides computing, for many sequences. No model runs.

Three parts: choosing the step's windows, laying them out as arrays, and taking in what came of them (advance, hash what
settled, end and admit). Neighbours: `server/engine/scheduler.py` and `batch.py` are what is timed.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from dataclasses import dataclass, field
from functools import partial

from server.bench.limits import Limits
from server.bench.repeat import Work, interleave
from server.bench.report import Figure, Report
from server.bench.work import BLOCK_SIZE, request
from server.engine.batch import build
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence

PARTS = ("choose", "lay out", "take in")
VOCAB_SIZE = 100


@dataclass
class Bench:
    """As many decoding sequences as asked for, at a context of `context` tokens and growing; when one ends another comes."""

    num_sequences: int
    context: int
    new_tokens: int
    numbers: int = 0
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        blocks_each = -(-(self.context + self.new_tokens) // BLOCK_SIZE) + 1
        self.config = EngineConfig(
            max_model_len=self.context + self.new_tokens,
            num_blocks=self.num_sequences * blocks_each,
            block_size=BLOCK_SIZE,
            max_num_seqs=self.num_sequences,
            max_num_batched_tokens=max(512, self.num_sequences),
        )
        self.blocks = BlockManager(self.config.num_blocks, BLOCK_SIZE, "bench")
        self.scheduler = Scheduler(self.config, self.blocks)
        for index in range(self.num_sequences):
            self._arrive(self.new_tokens * (index + 1) // self.num_sequences)
        self.step()

    def _arrive(self, new_tokens: int) -> None:
        """A sequence whose prompt counts as read once it is placed; no two prompts begin alike."""
        self.numbers += 1
        ids = tuple((self.numbers // VOCAB_SIZE**place) % VOCAB_SIZE for place in range(4)) + (0,) * (self.context - 4)
        self.scheduler.add(Sequence(request(ids, new_tokens), 0, 0, self.numbers))

    def step(self) -> dict[str, float]:
        """One step; seconds of each part."""
        started = time.perf_counter()
        windows = self.scheduler.schedule()
        chosen = time.perf_counter()
        build(windows, BLOCK_SIZE, draws=True)
        laid_out = time.perf_counter()
        num_ended = 0
        for window in windows:
            sequence = window.sequence
            if window.num_tokens > 1:  # newly placed: its prompt counts as read
                sequence.num_computed_tokens = sequence.num_touched_tokens = sequence.num_tokens
            else:
                sequence.advance(1, 1)
            self.blocks.register(sequence)
            sequence.token_ids.append(sequence.num_tokens % VOCAB_SIZE)
            if sequence.num_tokens >= sequence.max_num_tokens:
                self.scheduler.finish(sequence, "length")
                num_ended += 1
        taken_in = time.perf_counter()
        for _ in range(num_ended):
            self._arrive(self.new_tokens)
        return dict(zip(PARTS, (chosen - started, laid_out - chosen, taken_in - laid_out), strict=True))

    def milliseconds(self, num_steps: int) -> dict[str, float]:
        """Median over steps of each part, and of the whole as `all`."""
        steps = [self.step() for _ in range(num_steps)]
        medians = {part: 1000 * statistics.median(step[part] for step in steps) for part in PARTS}
        return {**medians, "all": 1000 * statistics.median(sum(step.values()) for step in steps)}


def run(args: Namespace, report: Report, limits: Limits) -> None:
    """Every number of sequences; the machine's limits say nothing here."""
    del limits
    for num_sequences in args.sequences:
        bench = Bench(num_sequences, args.context, args.new_tokens)
        parts: dict[str, list[float]] = {part: [] for part in PARTS}

        def sample(bench: Bench = bench, parts: dict[str, list[float]] = parts) -> float:
            medians = bench.milliseconds(args.steps)
            for part in PARTS:
                parts[part].append(medians[part])
            return medians["all"]

        name = f"{num_sequences} sequences at context {args.context}"
        (whole,) = interleave([Work(name, sample, partial(bench.milliseconds, args.steps))], args.repetitions, name)
        details = {"sequences": num_sequences, "context": args.context}
        parts_of = {part: statistics.median(values) for part, values in parts.items()}
        remark = ", ".join(f"{part} {value:.3f}" for part, value in parts_of.items())
        report.add(Figure(name, "ms", whole, {**details, "parts_ms": parts_of}, remark))
