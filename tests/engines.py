"""Engines over tiny models, and what tests want to know of their output."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Any

from lrt_core.generate import generate
from lrt_core.grammar import Grammar
from lrt_core.model import InputProjections, LatentRecurrentTransformer
from lrt_core.native_model import NativeModel, can_run
from lrt_core.sampling_params import SamplingParams
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner
from server.engine.request import FinishReason, GenerationRequest, StoppingParams, TokenLogprob
from server.engine.sequence import Sequence
from server.engine.stats import StepStats
from tests.helpers import tiny_model


def engine_config(**overrides: Any) -> EngineConfig:
    """Room for 8 sequences of 160 tokens in blocks of 4; windows of 16 settled tightly enough for float32 comparisons."""
    values: dict[str, Any] = {
        "max_model_len": 160,
        "num_blocks": 320,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "window": 16,
        "tolerance": 1e-6,
    }
    return EngineConfig(**{**values, **overrides})


def make_engine(model: LatentRecurrentTransformer | None = None, eos_ids: Collection[int] = (), **overrides: Any) -> Engine:
    """An engine that checks its invariants after every step; overrides as in `engine_config`."""
    plain, config = model or tiny_model(), engine_config(**overrides)
    # As the loader does, but that a model which the caller has fused or packed stays what it is.
    is_fused = not isinstance(plain.get_submodule("layers.0.attention").input, InputProjections)
    served = NativeModel(plain, config.max_model_len) if can_run(plain) and not is_fused else plain
    return Engine(ModelRunner(served, config), eos_ids, check_invariants=True, seed=0)


def request(
    prompt_ids: Iterable[int],
    max_tokens: int = 8,
    *,
    request_id: str = "request",
    n: int = 1,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    priority: int = 0,
    cache_salt: str | None = None,
    grammar: Grammar | None = None,
    **sampling: Any,
) -> GenerationRequest:
    """Greedy unless told otherwise; further names are those of SamplingParams."""
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    stopping = StoppingParams(max_tokens, ignore_eos, stop)
    return GenerationRequest(
        request_id, tuple(prompt_ids), params, stopping, n, logprobs, prompt_logprobs, priority, cache_salt, grammar=grammar
    )


@dataclass
class Outcome:
    """What one sample came to."""

    tokens: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> list[int]:
        """Generated ids."""
        return [token.token_id for token in self.tokens]


@dataclass
class Run:
    """Samples of every request in order, and every step's stats."""

    outcomes: list[list[Outcome]]
    steps: list[StepStats]

    @property
    def token_ids(self) -> list[list[int]]:
        """Generated ids of every request's only sample."""
        assert all(len(samples) == 1 for samples in self.outcomes)
        return [samples[0].token_ids for samples in self.outcomes]

    def total(self, name: str) -> int:
        """Sum of a counter over the steps."""
        return sum(getattr(step, name) for step in self.steps)

    def all_of(self, name: str) -> list[float]:
        """A list-valued field over all steps."""
        return [value for step in self.steps for value in getattr(step, name)]


def run(engine: Engine, requests: SequenceABC[GenerationRequest], traffic: random.Random | None = None) -> Run:
    """Add all requests, or, with traffic, in a random order some at once and some steps after others; step until nothing is
    left; every block must be free then."""
    waiting = list(range(len(requests)))
    if traffic is not None:
        traffic.shuffle(waiting)
    sequences: dict[int, list[Sequence]] = {}
    outcomes: dict[Sequence, Outcome] = {}
    steps = []
    while waiting or engine.has_work():
        for _ in range(len(waiting) if traffic is None else min(len(waiting), traffic.choice([0, 0, 0, 1, 1, 3]))):
            number = waiting.pop(0)
            sequences[number] = engine.add(requests[number])
            outcomes.update((sequence, Outcome()) for sequence in sequences[number])
        if not engine.has_work():
            continue
        output = engine.step()
        steps.append(output.stats)
        for item in output.outputs:
            outcome = outcomes[item.sequence]
            assert outcome.finish_reason is None, "an output after the end"
            outcome.tokens += [item.token] if item.token is not None else []
            outcome.prompt_logprobs = item.prompt_logprobs or outcome.prompt_logprobs
            outcome.finish_reason = item.finish_reason
    assert engine.blocks.num_free_blocks == engine.config.num_blocks
    return Run([[outcomes[sequence] for sequence in sequences[number]] for number in range(len(requests))], steps)


def oracle(model: LatentRecurrentTransformer, item: GenerationRequest, eos_ids: Collection[int] = ()) -> list[int]:
    """What a request's first sample must come to, token by token and alone."""
    ends = frozenset() if item.stopping.ignore_eos else frozenset(eos_ids)
    return list(generate(model, item.prompt_ids, item.stopping.max_tokens, item.sampling, ends, grammar=item.grammar))
