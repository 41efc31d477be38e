"""The bundled checkpoint on 100 prompts: reading in windows, reading token by token and the oracle agree."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lrt_core.checkpoint import BUNDLED, load_model, load_tokenizer
from lrt_core.generate import read
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.refine import relative_change
from server.engine.config import PrefillMode
from server.engine.loader import DEFAULT_TOLERANCE
from tests.engines import make_engine, request

NUM_PROMPTS, LONGEST, MAX_TOKENS = 100, 300, 8
TOLERANCE = DEFAULT_TOLERANCE[torch.float32]
ROUNDING = 1e-5
"""What float32 itself may change in a latent between two ways of computing it."""
WORDS = (
    *("self", "value", "items", "result", "index", "data", "name", "None", "True", "path", "line", "node"),
    *("count", "key", "text", "args", "of", "the", "a", "list", "is", "not", "in", "for"),
)
TEMPLATES = (
    "def {0}_{1}(self, {2}, {3}=None):\n    ",
    "for {0} in {1}.{2}:\n        {0}.{3}({1})\n    ",
    "if {0} is not None and {1} == {2}:\n        return {3}\n    ",
    "import {0}\nfrom {1} import {2}, {3}\n\n",
    "# The {0} of {1} {2} {3}.\n",
    '    raise ValueError("{0} {1} {2}: %s" % {3})\n',
)


@dataclass
class Reading:
    """One prompt as the engine read and continued it."""

    latents: Tensor
    output: list[int]


def source_text(rng: random.Random) -> str:
    """Lines in the manner of Python, the same on every machine."""
    return "".join(rng.choice(TEMPLATES).format(*rng.choices(WORDS, k=4)) for _ in range(40))


def prompts() -> list[list[int]]:
    """Lengths 1, 300 and in between evenly on a logarithmic scale; the first token begins a document or cuts into one."""
    tokenizer, rng = load_tokenizer(BUNDLED), random.Random(0)
    lengths = [round(math.exp(math.log(LONGEST) * i / (NUM_PROMPTS - 1))) for i in range(NUM_PROMPTS)]
    found = []
    for number, length in enumerate(lengths):
        ids = tokenizer.encode(source_text(rng))
        start = rng.randrange(20) if number % 2 else 0
        found.append(ids[start : start + length])
    assert [len(ids) for ids in found] == lengths
    return found


def read_by_engine(model: LatentRecurrentTransformer, ids: list[list[int]], prefill: PrefillMode) -> list[Reading]:
    """All prompts at once; latents are taken from the pool as soon as a prompt is read."""
    engine = make_engine(
        model,
        prefill=prefill,
        tolerance=TOLERANCE,
        window=128,
        max_model_len=LONGEST + MAX_TOKENS,
        num_blocks=700,
        block_size=16,
        max_num_seqs=NUM_PROMPTS,
        max_num_batched_tokens=512,
    )
    sequences = [engine.add(request(own, MAX_TOKENS))[0] for own in ids]
    latents = {}
    while engine.has_work():
        for item in engine.step().outputs:
            sequence = item.sequence
            if sequence.num_output_tokens == 1:
                slots = [sequence.block_table[p // 16] * 16 + p % 16 for p in range(sequence.num_prompt_tokens)]
                latents[sequence] = engine.runner.pool.latents[slots]
    return [Reading(latents[sequence], sequence.output_ids) for sequence in sequences]


@pytest.mark.parametrize("dtype", DEFAULT_TOLERANCE)
def test_windows_settle(dtype: torch.dtype) -> None:
    """The trained recurrence contracts beyond the rounding: a window costs far fewer rows per token than its width."""
    model, ids = load_model(BUNDLED, dtype=dtype), prompts()[-1]
    engine = make_engine(
        model, window=64, tolerance=DEFAULT_TOLERANCE[dtype], max_model_len=LONGEST + 1, num_blocks=20, block_size=16
    )
    engine.add(request(ids, 1))
    passes = []
    while engine.has_work():
        passes += engine.step().stats.refinement_passes
    assert len(passes) == 1
    assert passes[0] < 24


@pytest.mark.slow
def test_windows_against_sequential_against_oracle() -> None:
    """Greedy tokens equal, latents within the tolerance.

    Every token of an output is the one that the oracle finds likeliest after all before it, so the output is the oracle's own.
    """
    model, ids = load_model(BUNDLED, dtype=torch.float32), prompts()
    windowed, sequential = (read_by_engine(model, ids, prefill) for prefill in ("window", "sequential"))
    for own, by_window, by_token in zip(ids, windowed, sequential, strict=True):
        expected = read(model, [*own, *by_window.output[:-1]])
        likeliest = expected.logits[len(own) - 1 :].argmax(-1).tolist()
        assert by_window.output == by_token.output == likeliest, len(own)
        latents = expected.latents[: len(own)]
        assert float(relative_change(by_window.latents, latents).max()) <= TOLERANCE + ROUNDING, len(own)
        assert float(relative_change(by_token.latents, latents).max()) <= ROUNDING, len(own)
