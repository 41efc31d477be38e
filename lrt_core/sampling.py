"""From logits to tokens and log-probabilities, for all rows of a batch at once.

A row's token depends on its own logits, parameters, seed and step alone, never on the rows beside it: random rows draw one
uniform number from a counter (seed, step) and invert the cumulative distribution. So the same seed gives the same output
alone, in any batch, and after a preemption. Neighbours: `sampling_params.py` (the parameters), `generate.py` and the
server's model runner (the callers), `history.py` (what penalties count).

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrt_core.history import TokenHistory
from lrt_core.kernels.sampling import Draws, draw, draw_twin, top_logprobs
from lrt_core.sampling_params import SamplingParams

__all__ = ["SampleRow", "sample", "sample_twin", "top_logprobs", "uniform"]

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SampleRow:
    """What a row of logits needs to become a token.

    seed and step pick the random number; step counts the sample's generated tokens. prompt_ids and output_ids are read only
    when penalties or bad words are on; with the history of both given, the end of output_ids does, as long as the longest bad
    word. forbidden: ids that this step cannot give. permitted: bool [V], the ids that a grammar admits; None for no grammar.
    """

    params: SamplingParams
    seed: int = 0
    step: int = 0
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    forbidden: Sequence[int] = ()
    history: TokenHistory | None = None
    permitted: npt.NDArray[np.bool_] | None = None

    @property
    def is_adjusted(self) -> bool:
        """Whether the token is drawn from other logits than the model's, a grammar apart."""
        return bool(self.forbidden) or not self.params.takes_logits_as_they_are


def _mix64(x: int) -> int:
    """One round of the splitmix64 finaliser (Steele et al., 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that is a function of (seed, step) alone; 32 bits, so that it stays below 1 in any arithmetic."""
    state = _mix64((seed & _MASK) + 0x9E3779B97F4A7C15 & _MASK)
    return (_mix64((state + (step + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 32) / 2**32


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Draw one token id per row: float32 logits [R, V] (not modified) -> int64 [R]."""
    return draw(_constrain(logits, rows), _draws(rows))


def sample_twin(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """`sample` by torch alone."""
    return draw_twin(_constrain(logits, rows), _draws(rows))


def _draws(rows: Sequence[SampleRow]) -> Draws:
    params = [row.params for row in rows]
    return Draws(
        [param.temperature for param in params],
        [param.top_k for param in params],
        [param.top_p for param in params],
        [param.min_p for param in params],
        [0.0 if row.params.greedy else uniform(row.seed, row.step) for row in rows],
    )


def _constrain(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Adjusted logits without what the rows' grammars forbid.

    Where the other parameters leave nothing that the grammar admits, the grammar alone decides: its end, say, comes before
    everything that would put it off.
    """
    adjusted = _adjust(logits, rows)
    bound = [(i, row.permitted) for i, row in enumerate(rows) if row.permitted is not None]
    if bound and adjusted is logits:
        adjusted = logits.clone()
    for i, permitted in bound:
        forbidden = torch.from_numpy(~permitted).to(logits.device)
        adjusted[i].masked_fill_(forbidden, -torch.inf)
        if bool(adjusted[i].max() == -torch.inf):
            adjusted[i] = logits[i].masked_fill(forbidden, -torch.inf)
    return adjusted


def _adjust(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Penalties, bias, then what is allowed and forbidden; copying only when some row has them."""
    touched = [i for i, row in enumerate(rows) if row.is_adjusted]
    if touched:
        logits = logits.clone()
    for i in touched:
        _penalise(logits[i], rows[i])
        _add_bias(logits[i], rows[i].params)
        _restrict(logits[i], rows[i])
    return logits


def _penalise(logits: Tensor, row: SampleRow) -> None:
    """Apply repetition, frequency and presence penalties to one row [V] in place."""
    params = row.params
    if not params.needs_history:
        return
    history = row.history or TokenHistory(row.prompt_ids, row.output_ids)
    ids, counts = _tensor(history.ids, logits), _tensor(history.counts, logits)
    values = logits[ids]
    if params.repetition_penalty != 1:
        penalty = params.repetition_penalty
        values = torch.where(values > 0, values / penalty, values * penalty)
    values = values - params.frequency_penalty * counts.to(values.dtype) - params.presence_penalty * (counts > 0)
    logits[ids] = values


def _add_bias(logits: Tensor, params: SamplingParams) -> None:
    """Add logit_bias to one row [V] in place."""
    if params.logit_bias:
        ids, biases = (_tensor(column, logits) for column in params.bias_arrays)
        logits[ids] += biases.to(logits.dtype)


def _restrict(logits: Tensor, row: SampleRow) -> None:
    """Leave of one row [V], in place, what is allowed and neither forbidden nor the end of a bad word."""
    if row.params.allowed_token_ids is not None:
        ids = _tensor(row.params.allowed_array, logits)
        allowed = logits[ids]
        logits.fill_(-torch.inf)
        logits[ids] = allowed
    forbidden = [*row.forbidden, *_ends_of_bad_words(row)]
    if forbidden:
        logits[torch.tensor(forbidden, device=logits.device)] = -torch.inf


def _ends_of_bad_words(row: SampleRow) -> list[int]:
    words = row.params.bad_words
    if not words:
        return []
    tail = tuple(row.output_ids[max(0, len(row.output_ids) - row.params.longest_bad_word + 1) :])
    return [word[-1] for word in words if len(word) == 1 or tail[1 - len(word) :] == word[:-1]]


def _tensor(numbers: array[int] | array[float], like: Tensor) -> Tensor:
    """A copy of the numbers on the device of `like`, int64 or float64."""
    return torch.from_numpy(np.array(numbers)).to(like.device)
