"""One step on the model: forward, which positions settled, logits where they are read, tokens drawn.

The lm_head runs only on rows that are read (a sequence's last settled row, prompt rows whose logprobs were asked for), prompt
rows in chunks of `LOGITS_CHUNK`, so that logits of a long prompt never exist whole.
Neighbours: `batch.py` lays the step out, `lrt_core.refine` has the settling rule, `engine.py` calls `execute`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrt_core.model import LatentRecurrentTransformer
from lrt_core.paged import PagedPool
from lrt_core.refine import num_settled, relative_change
from lrt_core.sampling import SampleRow, sample, top_logprobs
from server.engine.batch import Batch, build
from server.engine.config import EngineConfig
from server.engine.request import TokenLogprob
from server.engine.scheduler import ScheduledWindow
from server.engine.sequence import Sequence

LOGITS_CHUNK = 256
"""Rows of logits that exist at once when prompt logprobs are computed."""


@dataclass
class WindowResult:
    """What a step did to one sequence. residual: relative change of the window's latents, None for a window of one."""

    window: ScheduledWindow
    num_settled: int
    residual: float | None
    token: TokenLogprob | None = None
    """The token drawn, when the step settled the sequence's last position and another token is wanted."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt tokens behind the settled positions, when asked for."""


class ModelRunner:
    """The model with its paged pool."""

    def __init__(self, model: LatentRecurrentTransformer, config: EngineConfig) -> None:
        self.model, self.config = model, config
        self.pool = PagedPool(model.config, config.capacity, model.dtype, model.device)

    @torch.inference_mode()
    def execute(self, windows: SequenceABC[ScheduledWindow]) -> list[WindowResult]:
        """Run one step; results stand in the order of the batch. Sequences are not changed (the engine does that)."""
        batch = build(windows, self.pool, self.config.block_size)
        recurrent = self.model.config.recurrence is not None
        memory = self.pool.load_memory(batch.memory_rows) if recurrent else None
        hidden, latents = self.model(batch.tokens, batch.positions, memory, batch.kv)
        self.pool.store_latents(batch.slots, latents)
        results = _settle(batch, latents, memory, self.config.tolerance)
        self._score_prompts(batch, results, hidden)
        self._sample(batch, results, hidden)
        return results

    def _sample(self, batch: Batch, results: list[WindowResult], hidden: Tensor) -> None:
        """Draw a token for every sequence whose last position settled, unless it wants none."""
        ready = [i for i, result in enumerate(results) if _is_ready(result)]
        if not ready:
            return
        rows = torch.tensor([batch.offsets[i] + results[i].num_settled - 1 for i in ready], device=hidden.device)
        logits = self.model.logits(hidden.index_select(0, rows))
        sequences = [results[i].window.sequence for i in ready]
        ids = sample(logits, [_sample_row(sequence) for sequence in sequences])
        entries = _token_logprobs(logits, ids, [sequence.request.logprobs for sequence in sequences])
        for i, entry in zip(ready, entries, strict=True):
            results[i].token = entry

    def _score_prompts(self, batch: Batch, results: list[WindowResult], hidden: Tensor) -> None:
        for result, offset in zip(results, batch.offsets, strict=False):
            sequence = result.window.sequence
            if sequence.request.prompt_logprobs is None:
                continue
            # Position p scores prompt token p + 1; after a preemption those scored before are not scored again.
            first = max(result.window.start, len(sequence.prompt_logprobs))
            end = min(result.window.start + result.num_settled, sequence.num_prompt_tokens - 1)
            for start in range(first, end, LOGITS_CHUNK):
                stop = min(start + LOGITS_CHUNK, end)
                base = offset - result.window.start
                logits = self.model.logits(hidden[base + start : base + stop])
                ids = torch.tensor(sequence.token_ids[start + 1 : stop + 1], device=logits.device)
                result.prompt_logprobs += _token_logprobs(logits, ids, [sequence.request.prompt_logprobs] * len(ids))


def _settle(batch: Batch, latents: Tensor, memory: Tensor | None, tolerance: float) -> list[WindowResult]:
    """Settled counts of every window: all rows for a plain model and for windows of one, by the changes otherwise."""
    widths = [window.num_tokens for window in batch.windows]
    if memory is None or max(widths) == 1:
        return [WindowResult(window, window.num_tokens, None) for window in batch.windows]
    changes: list[float] = relative_change(latents[:-1], memory[1:]).tolist()
    results = []
    for window, offset in zip(batch.windows, batch.offsets, strict=False):
        own = changes[offset : offset + window.num_tokens - 1]
        residual = max(own) if own else None
        results.append(WindowResult(window, num_settled(own, tolerance), residual))
    return results


def _is_ready(result: WindowResult) -> bool:
    sequence = result.window.sequence
    settled = result.window.start + result.num_settled
    return settled == sequence.num_tokens and sequence.num_tokens < sequence.max_num_tokens


def _sample_row(sequence: Sequence) -> SampleRow:
    params = sequence.request.sampling
    if not params.needs_history:
        return SampleRow(params, sequence.seed, sequence.num_output_tokens)
    return SampleRow(params, sequence.seed, sequence.num_output_tokens, sequence.request.prompt_ids, tuple(sequence.output_ids))


def _token_logprobs(logits: Tensor, ids: Tensor, wanted: list[int | None]) -> list[TokenLogprob]:
    """One entry per row; rows that want no logprobs carry None."""
    if all(count is None for count in wanted):
        return [TokenLogprob(token, None) for token in ids.tolist()]
    most = max(count or 0 for count in wanted)
    own, values, top_ids = (x.tolist() for x in top_logprobs(logits, ids, min(most, logits.shape[-1])))
    entries = []
    for row, (token, count) in enumerate(zip(ids.tolist(), wanted, strict=True)):
        top = tuple(zip(top_ids[row][: count or 0], values[row][: count or 0], strict=True))
        entries.append(TokenLogprob(token, None if count is None else own[row], top))
    return entries
