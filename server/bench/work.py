"""How an engine is driven without a server: decoding, reading a prompt, clients that come back for more.

Neighbours: `offline.py`, `prefill.py`, `worker.py` and `growth.py` time what is here.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import torch

from lrt_core.sampling_params import SamplingParams
from server.bench.errors import BenchError
from server.engine.config import EngineConfig, PrefillMode
from server.engine.engine import Engine
from server.engine.loader import DEFAULT_TOLERANCE, default_window, prompt_rows
from server.engine.model_runner import ModelRunner, ServingModel
from server.engine.request import GenerationRequest, StoppingParams

BLOCK_SIZE = 16
_numbers = itertools.count()
"""Of requests: no two have the same prompt, so that the prefix cache, where it is on, never answers for the model."""


@dataclass(frozen=True)
class Load:
    """What clients ask for, in tokens: `clients` at a time, `requests` in all."""

    clients: int
    requests: int
    prompt_len: int
    new_tokens: int


def make_engine(
    model: ServingModel,
    max_num_seqs: int,
    max_len: int,
    prefill: PrefillMode = "window",
    prefix_caching: bool = False,
    num_blocks: int | None = None,
) -> Engine:
    """An engine with room for max_num_seqs sequences of max_len tokens, unless num_blocks says otherwise.

    Raises BenchError when the pool cannot be had.
    """
    window = default_window(model.config, model.device.type)
    config = EngineConfig(
        max_model_len=max_len,
        num_blocks=num_blocks or max_num_seqs * -(-max_len // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(512, max_num_seqs),
        prefill=prefill,
        window=window,
        num_prompt_rows=prompt_rows(window, model.config, model.device.type),
        tolerance=DEFAULT_TOLERANCE[model.dtype],
        prefix_caching=prefix_caching,
    )
    try:
        return Engine(ModelRunner(model, config), eos_ids=(), seed=0)
    except RuntimeError as error:  # what torch raises when memory is short
        raise BenchError(f"no memory for a cache of {config.capacity} tokens: {str(error).splitlines()[0]}") from None


def random_request(vocab_size: int, prompt_len: int, new_tokens: int) -> GenerationRequest:
    """Greedy, from a prompt of ids that no earlier request had."""
    number = next(_numbers)
    generator = torch.Generator().manual_seed(number)
    ids = tuple(torch.randint(0, vocab_size, (prompt_len,), generator=generator).tolist())
    return request(ids, new_tokens)


def request(ids: tuple[int, ...], new_tokens: int) -> GenerationRequest:
    """Greedy, of exactly new_tokens tokens."""
    return GenerationRequest("bench", ids, SamplingParams(temperature=0), StoppingParams(new_tokens, ignore_eos=True))


def decode_rate(engine: Engine, clients: int, prompt_len: int, new_tokens: int) -> float:
    """Tokens per second of all clients together, from the moment every prompt is read until the last token."""
    vocab_size = engine.runner.model.config.vocab_size
    for _ in range(clients):
        engine.add(random_request(vocab_size, prompt_len, new_tokens))
    while any(sequence.num_output_tokens == 0 for sequence in (*engine.scheduler.waiting, *engine.scheduler.running)):
        engine.step()
    started, tokens = time.perf_counter(), 0
    while engine.has_work():
        tokens += sum(output.token is not None for output in engine.step().outputs)
    return tokens / (time.perf_counter() - started)


def closed_loop_rate(engine: Engine, load: Load) -> float:
    """Generated tokens per second with prompts included, where each client asks again as soon as it is answered."""
    vocab_size = engine.runner.model.config.vocab_size
    waiting = [random_request(vocab_size, load.prompt_len, load.new_tokens) for _ in range(load.requests)]
    started, tokens = time.perf_counter(), 0
    for _ in range(min(load.clients, load.requests)):
        engine.add(waiting.pop())
    while engine.has_work():
        for output in engine.step().outputs:
            tokens += output.token is not None
            if output.finish_reason is not None and waiting:
                engine.add(waiting.pop())
    return tokens / (time.perf_counter() - started)


@dataclass(frozen=True)
class Reading:
    """One prompt on an idle engine. rows_per_token: forward rows computed per prompt token (1 without refinement)."""

    seconds: float
    rows_per_token: float
    output_ids: list[int]


def read_prompt(engine: Engine, ids: tuple[int, ...], new_tokens: int = 1) -> Reading:
    """Read a prompt; `seconds` until its first token is there."""
    (sequence,) = engine.add(request(ids, new_tokens))
    rows_per_token, started = 1.0, time.perf_counter()
    while sequence.num_output_tokens == 0:
        passes = engine.step().stats.refinement_passes
        rows_per_token = passes[0] if passes else rows_per_token
    seconds = time.perf_counter() - started
    while engine.has_work():
        engine.step()
    return Reading(seconds, rows_per_token, sequence.output_ids)


def random_ids(vocab_size: int, num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """A prompt."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, vocab_size, (num_tokens,), generator=generator).tolist())
