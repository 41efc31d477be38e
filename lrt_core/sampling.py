"""From logits to tokens and log-probabilities, for all rows of a batch at once.

A row's token depends on its own logits, parameters, seed and step alone, never on the rows beside it: random rows draw one
uniform number from a counter (seed, step) and invert the cumulative distribution. So the same seed gives the same output
alone, in any batch, and after a preemption. Neighbours: `sampling_params.py` (the parameters), `generate.py` and the
server's model runner (the callers).

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt_core.sampling_params import SamplingParams

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SampleRow:
    """What a row of logits needs to become a token.

    seed and step pick the random number; step counts the sample's generated tokens. prompt_ids and output_ids are read only
    when penalties are on.
    """

    params: SamplingParams
    seed: int = 0
    step: int = 0
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()


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
    assert logits.shape[0] == len(rows)
    logits = _adjust(logits, rows)
    ids = logits.argmax(dim=-1)
    for filtered in (False, True):
        chosen = [i for i, row in enumerate(rows) if not row.params.greedy and _is_filtered(row.params) == filtered]
        if chosen:
            index = torch.tensor(chosen, device=logits.device)
            ids[index] = _draw(logits[index], [rows[i] for i in chosen], filtered)
    return ids


def top_logprobs(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the unmodified distribution (float32 logits [R, V], natural log).

    Returns those of `ids` [R], the k largest [R, k] and their ids [R, k].
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    values, top_ids = logprobs.topk(k, dim=-1)
    return own, values, top_ids


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _adjust(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Penalties, bias and allowed ids, copying only when some row has them."""
    touched = [
        (i, row)
        for i, row in enumerate(rows)
        if row.params.needs_history or row.params.logit_bias or row.params.allowed_token_ids is not None
    ]
    if touched:
        logits = logits.clone()
    for i, row in touched:
        _penalise(logits[i], row)
        for token, bias in row.params.logit_bias.items():
            logits[i, token] += bias
        if row.params.allowed_token_ids is not None:
            forbidden = torch.ones_like(logits[i], dtype=torch.bool)
            forbidden[list(row.params.allowed_token_ids)] = False
            logits[i].masked_fill_(forbidden, -torch.inf)
    return logits


def _penalise(logits: Tensor, row: SampleRow) -> None:
    """Apply repetition, frequency and presence penalties to one row [V] in place."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}), device=logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.output_ids and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.output_ids)
        seen = torch.tensor(list(counts), device=logits.device)
        occurrences = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[seen] -= params.frequency_penalty * occurrences + params.presence_penalty


def _draw(logits: Tensor, rows: Sequence[SampleRow], filtered: bool) -> Tensor:
    """Invert each row's cumulative distribution at its uniform number; [R, V] -> [R]."""
    temperature = _column([row.params.temperature for row in rows], logits)
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / temperature
    order: Tensor | None = None
    if filtered:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        scaled = _filter_sorted(scaled, rows)
    cumulative = torch.softmax(scaled, dim=-1).cumsum(-1)
    target = _column([uniform(row.seed, row.step) for row in rows], logits) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, target, right=True)
    return (picked if order is None else order.gather(-1, picked)).squeeze(-1)


def _filter_sorted(scaled: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Drop what top_k, then top_p, then min_p exclude from falling logits [R, V]."""
    vocab_size = scaled.shape[-1]
    top_k = _column([row.params.top_k if row.params.top_k > 0 else vocab_size for row in rows], scaled)
    scaled = scaled.masked_fill(torch.arange(vocab_size, device=scaled.device) >= top_k, -torch.inf)
    probs = torch.softmax(scaled, dim=-1)
    # A token stays while the mass before it is below top_p, so the likeliest always does.
    top_p = _column([row.params.top_p if row.params.top_p < 1 else torch.inf for row in rows], scaled)
    scaled = scaled.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)
    # min_p is relative to the likeliest, so what top_p dropped changes nothing in it.
    min_p = _column([row.params.min_p for row in rows], scaled)
    return scaled.masked_fill(probs < min_p * probs[:, :1], -torch.inf)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(-1)
