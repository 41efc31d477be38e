"""Tokens and log-probabilities from rows of logits: native on CPUs, and beside each function the torch twin that defines it.

Neighbours: `sampling.cpp` is the source, `lrt_core/sampling.py` the caller. A row that holds a NaN, or whose largest logit is
infinite, has no distribution: it gives the id that argmax gives, and log-probabilities that are NaN.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt_core import kernels

_VERSION = 1
"""Of the library's sampling functions; raised with every change of one, so that an older build's are not called."""


@dataclass(frozen=True)
class Draws:
    """How each of R rows is drawn; the lists are as long. `SamplingParams` says what the parameters mean.

    uniforms: numbers in [0, 1 - 2^-32] at which the cumulative distributions are inverted; greedy rows ignore theirs.
    """

    temperatures: Sequence[float]
    top_ks: Sequence[int]
    top_ps: Sequence[float]
    min_ps: Sequence[float]
    uniforms: Sequence[float]

    def is_filtered(self, row: int) -> bool:
        """Whether top_k, top_p or min_p may drop tokens."""
        return self.top_ks[row] > 0 or self.top_ps[row] < 1 or self.min_ps[row] > 0

    def column(self, name: str, chosen: Sequence[int], like: Tensor) -> Tensor:
        """Field `name` of the chosen rows as float64 [R, 1], on the device of `like`."""
        values = getattr(self, name)
        return torch.tensor([values[row] for row in chosen], dtype=torch.float64, device=like.device).unsqueeze(-1)


def is_native() -> bool:
    """Whether native sampling runs."""
    return kernels.is_native() and _is_current()


def _is_current() -> bool:
    library = kernels._library
    return library is not None and hasattr(library, "lrt_sampling_version") and library.lrt_sampling_version() == _VERSION


def _can_run(logits: Tensor) -> bool:
    fits = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.stride(-1) == 1
    return fits and not logits.requires_grad and logits.numel() > 0 and is_native()


def draw(logits: Tensor, draws: Draws) -> Tensor:
    """One token id per row: float32 logits [R, V] -> int64 [R]. Greedy takes the first of several largest.

    Native and twin differ only where a rounding error of float64 decides.
    """
    if not _can_run(logits):
        return draw_twin(logits, draws)
    assert kernels._library is not None
    num_rows, vocab_size = logits.shape
    top_ks = array("q", draws.top_ks)
    temperatures, *others = (array("d", values) for values in (draws.temperatures, draws.top_ps, draws.min_ps, draws.uniforms))
    assert len(top_ks) == num_rows and all(len(column) == num_rows for column in (temperatures, *others))
    addresses = [temperatures.buffer_info()[0], top_ks.buffer_info()[0], *(column.buffer_info()[0] for column in others)]
    ids = torch.empty(num_rows, dtype=torch.int64)
    kernels._library.lrt_sample(
        ctypes.c_void_p(logits.data_ptr()),
        *map(ctypes.c_int64, (logits.stride(0), num_rows, vocab_size)),
        *map(ctypes.c_void_p, addresses),
        ctypes.c_void_p(ids.data_ptr()),
        torch.get_num_threads(),
    )
    return ids


def draw_twin(logits: Tensor, draws: Draws) -> Tensor:
    """`draw` by torch, on any device."""
    ids = logits.argmax(dim=-1)
    for filtered in (False, True):
        chosen = [i for i, t in enumerate(draws.temperatures) if t != 0 and draws.is_filtered(i) == filtered]
        if chosen:
            index = torch.tensor(chosen, device=logits.device)
            ids[index] = _invert(logits[index], draws, chosen, ids[index], filtered)
    return ids


def _invert(logits: Tensor, draws: Draws, chosen: list[int], largest: Tensor, filtered: bool) -> Tensor:
    """Invert each row's cumulative distribution at its uniform number; [R, V] -> [R]."""
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / draws.column("temperatures", chosen, logits)
    order: Tensor | None = None
    if filtered:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        scaled = _filter_sorted(scaled, draws, chosen)
    cumulative = torch.softmax(scaled, dim=-1).cumsum(-1)
    target = draws.column("uniforms", chosen, logits) * cumulative[:, -1:]
    # Where there is no distribution the search runs past the end.
    picked = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    ids = (picked if order is None else order.gather(-1, picked)).squeeze(-1)
    return torch.where(cumulative[:, -1].isnan(), largest, ids)


def _filter_sorted(scaled: Tensor, draws: Draws, chosen: list[int]) -> Tensor:
    """Drop what top_k, then top_p, then min_p exclude from falling logits [R, V]."""
    top_k = draws.column("top_ks", chosen, scaled)
    places = torch.arange(scaled.shape[-1], device=scaled.device)
    scaled = scaled.masked_fill((top_k > 0) & (places >= top_k), -torch.inf)
    probs = torch.softmax(scaled, dim=-1)
    # A token stays while the mass before it is below top_p, so the likeliest always does.
    top_p = draws.column("top_ps", chosen, scaled)
    scaled = scaled.masked_fill((top_p < 1) & (probs.cumsum(-1) - probs >= top_p), -torch.inf)
    # min_p is relative to the likeliest, so what top_p dropped changes nothing in it.
    min_p = draws.column("min_ps", chosen, scaled)
    return scaled.masked_fill(probs < min_p * probs[:, :1], -torch.inf)


def top_logprobs(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of float32 logits [R, V], natural log: of `ids` [R], the k <= V largest [R, k] and their ids [R, k].

    Equal ones come in the order of their ids from native code, in any order from the twin.
    """
    if not (_can_run(logits) and ids.device.type == "cpu"):
        return top_logprobs_twin(logits, ids, k)
    assert kernels._library is not None and ids.dtype == torch.int64 and 0 <= k <= logits.shape[-1]
    num_rows, vocab_size = logits.shape
    ids = ids.contiguous()
    own, values = torch.empty(num_rows), torch.empty(num_rows, k)
    top_ids = torch.empty(num_rows, k, dtype=torch.int64)
    kernels._library.lrt_top_logprobs(
        ctypes.c_void_p(logits.data_ptr()),
        *map(ctypes.c_int64, (logits.stride(0), num_rows, vocab_size)),
        ctypes.c_void_p(ids.data_ptr()),
        ctypes.c_int64(k),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (own, values, top_ids)),
        torch.get_num_threads(),
    )
    return own, values, top_ids


def top_logprobs_twin(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`top_logprobs` by torch, on any device."""
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    values, top_ids = logprobs.topk(k, dim=-1)
    return own, values, top_ids
