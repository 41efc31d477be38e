"""The oracle: token-by-token reading and generation with true recurrence, one sequence, nothing clever.

Every faster path (windowed refinement, the paged cache, batches, fused weights) is tested against this file, so it stays slow
and obvious: one forward per token, the latent of each token handed to the next as its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
from torch import Tensor

from lrt_core.kv import DenseKV
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.sampling import SampleRow, sample_twin
from lrt_core.sampling_params import SamplingParams


class ReadResult(NamedTuple):
    """logits [T, V] float32 after each token; latents [T, D], each token's outgoing latent."""

    logits: Tensor
    latents: Tensor


class Stepper:
    """One sequence and what it carries: the cache and the latent of its last token."""

    def __init__(self, model: LatentRecurrentTransformer, max_len: int) -> None:
        self.model = model
        self.kv = DenseKV(model.config, 1, max_len, model.dtype, model.device)
        self.memory = model.zero_memory(1, 1)

    @torch.no_grad()
    def step(self, token: int) -> tuple[Tensor, Tensor]:
        """Take in one token; returns the logits [V] after it and its latent [D]."""
        tokens = torch.tensor([[token]], device=self.model.device)
        positions = torch.tensor([self.kv.length], device=self.model.device)
        hidden, latents = self.model(tokens, positions, self.memory, self.kv)
        self.kv.advance(1)
        if self.memory is not None:
            self.memory = latents
        return self.model.logits(hidden)[0, 0], latents[0, 0]


def read(model: LatentRecurrentTransformer, ids: Sequence[int]) -> ReadResult:
    """Read `ids` token by token. Raises ValueError for an empty sequence or an id outside the vocabulary."""
    check_ids(model, ids)
    stepper = Stepper(model, len(ids))
    steps = [stepper.step(token) for token in ids]
    return ReadResult(torch.stack([logits for logits, _ in steps]), torch.stack([latent for _, latent in steps]))


def generate(
    model: LatentRecurrentTransformer,
    prompt_ids: Sequence[int],
    max_tokens: int,
    params: SamplingParams | None = None,
    eos_ids: AbstractSet[int] = frozenset(),
    min_tokens: int = 0,
) -> Iterator[int]:
    """Yield up to max_tokens generated ids (greedy without `params`; seed None counts as 0); an id of `eos_ids` is the last,
    and none of the first min_tokens.

    Raises ValueError for an empty prompt or an id outside the vocabulary.
    """
    check_ids(model, prompt_ids)
    params = params or SamplingParams(temperature=0)
    stepper = Stepper(model, len(prompt_ids) + max_tokens)
    output: list[int] = []
    for token in prompt_ids:
        logits, _ = stepper.step(token)
    while len(output) < max_tokens:
        forbidden = tuple(eos_ids) if len(output) < min_tokens else ()
        row = SampleRow(params, params.seed or 0, len(output), prompt_ids, tuple(output), forbidden)
        output.append(int(sample_twin(logits.unsqueeze(0), [row])))
        yield output[-1]
        if output[-1] in eos_ids:
            return
        logits, _ = stepper.step(output[-1])


def check_ids(model: LatentRecurrentTransformer, ids: Sequence[int]) -> None:
    """Raise ValueError unless there is at least one id and all lie in the vocabulary."""
    if not ids:
        raise ValueError("the prompt is empty")
    vocab_size = model.config.vocab_size
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} at position {position} lies outside 0..{vocab_size - 1}")
