"""One step on the model: forward, logits where they are read, tokens drawn.

The lm_head runs only on rows that are read (a sequence's last settled row, prompt rows whose logprobs were asked for), in
chunks of `logits_rows`, so that logits of a long prompt, or of many samples at once, never exist whole.
Neighbours: `batch.py` writes the step down, `lrt_core/step.py` and `native_model.py` compute it, `engine.py` calls `execute`.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lrt_core.model import LatentRecurrentTransformer
from lrt_core.native_model import NativeModel
from lrt_core.paged import PagedPool
from lrt_core.sampling import SampleRow, sample, top_logprobs
from lrt_core.step import run_step
from server.engine.batch import build, slots_of
from server.engine.block_manager import Copy
from server.engine.config import EngineConfig
from server.engine.request import TokenLogprob
from server.engine.scheduler import ScheduledWindow
from server.engine.sequence import Sequence

LOGITS_BYTES = 2**24
LOGITS_CHUNK = 256
"""Bounds of the float32 logits that exist at once: their size, and their rows where the vocabulary is small. What is made of
them takes a few times as much."""


def logits_rows(vocab_size: int) -> int:
    """Rows of logits that exist at once."""
    return max(1, min(LOGITS_CHUNK, LOGITS_BYTES // (4 * vocab_size)))


@dataclass
class WindowResult:
    """What a step did to one sequence. residual: relative change of the window's latents, None for a window of one."""

    window: ScheduledWindow
    num_settled: int
    residual: float | None
    tokens: list[TokenLogprob] = field(default_factory=list)
    """When the step settled the sequence's last position and another token is wanted: the token drawn for it, then one for
    each of its siblings."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt tokens behind the settled positions, when asked for."""
    is_finite: bool = True
    """Whether the states of all settled positions are numbers: a model may overflow."""
    latents: bytes | None = None
    """When the step settled the sequence's last position and latents are wanted: float32 rows, of the whole prompt if all are
    wanted and nothing was generated yet, else of that last position."""


class Scoring(NamedTuple):
    """Prompt positions from `start` on whose hidden states [R, D] tell the logprobs of the tokens behind them."""

    result: WindowResult
    start: int
    hidden: Tensor


ServingModel = LatentRecurrentTransformer | NativeModel


class ModelRunner:
    """The model, native or torch's, with its paged pool."""

    def __init__(self, model: ServingModel, config: EngineConfig) -> None:
        self.model: ServingModel = model
        self.config = config
        self.pool = PagedPool(model.config, config.capacity, model.dtype, model.device)
        self._native = model if isinstance(model, NativeModel) else None
        self._max_draws = logits_rows(model.config.vocab_size)
        self._checked: dict[tuple[bytes, int], int] = {}
        """Sums over the bits of the latents of blocks that the prefix cache knew at the last check."""

    def execute(self, windows: SequenceABC[ScheduledWindow], copies: SequenceABC[Copy] = ()) -> list[WindowResult]:
        """Copy blocks, then run one step; results stand in the order of the batch, those that only score last. Sequences are
        not changed (the engine does that)."""
        with torch.inference_mode():
            self._copy_blocks(copies)
            computing = [window for window in windows if window.num_tokens]
            results, scorings = self._compute(computing) if computing else ([], [])
            for window in windows:
                if not window.num_tokens:
                    results.append(WindowResult(window, 0, None))
                    scorings.append(self._cached_part(results[-1]))
            self._score(scorings)
        return results

    def clear(self, blocks: SequenceABC[int]) -> None:
        """Make zeros of blocks in which there may be what is no number."""
        size = self.config.block_size
        for block in blocks:
            for storage in (*self.pool.keys, *self.pool.values, self.pool.latents):
                storage[block * size : (block + 1) * size] = 0.0

    def check_invariants(self, sequences: SequenceABC[Sequence], named: Mapping[bytes, int]) -> None:
        """Assert, between two steps, that the row of no memory is zeros, that every sequence's memory is numbers, and that a
        block which the prefix cache knows (`named`: by hash) holds the latents that it had when this was last checked. A
        failure is a bug: AssertionError."""
        latents, size = self.pool.latents, self.config.block_size
        assert not bool(latents[self.pool.zero_row].any()), "the latent of no token was written"
        ends = [(sequence.block_table, sequence.num_computed_tokens) for sequence in sequences if sequence.num_computed_tokens]
        slots = [slot for table, end in ends for slot in slots_of(table, end - 1, end, size)]
        assert bool(latents[slots].isfinite().all()), "a settled token's latent is no number"
        bits = latents[: self.config.num_blocks * size].view(torch.int32).view(self.config.num_blocks, -1)
        sums = bits[list(named.values())].sum(1).tolist()
        for (key, block), sum in zip(named.items(), sums, strict=True):
            assert self._checked.get((key, block), sum) == sum, f"the latents of block {block} have changed"
        self._checked = dict(zip(named.items(), sums, strict=True))

    def _compute(self, windows: list[ScheduledWindow]) -> tuple[list[WindowResult], list[Scoring]]:
        """A forward over the windows; returns also which prompt tokens are to be scored by it."""
        ordered, step = build(windows, self.config.block_size, self._native is not None and len(windows) <= self._max_draws)
        if self._native is not None:
            outcome = self._native.run_step(step, self.pool, self.config.tolerance)
        else:
            assert isinstance(self.model, LatentRecurrentTransformer)
            outcome = run_step(self.model, step, self.pool, self.config.tolerance)
        told = zip(ordered, outcome.num_settled, outcome.residuals, outcome.is_finite, strict=True)
        results = [WindowResult(window, count, residual, is_finite=finite) for window, count, residual, finite in told]
        offsets = outcome.offsets
        if outcome.ids is None:
            self._sample(offsets, results, outcome.hidden)
        else:
            for result, token in zip(results, outcome.ids, strict=True):
                if token >= 0:
                    result.tokens.append(TokenLogprob(token, None))
        self._read_latents(results)
        return results, _settled_parts(offsets, results, outcome.hidden)

    def _sample(self, offsets: list[int], results: list[WindowResult], hidden: Tensor) -> None:
        """Draw a token for every sequence whose last position settled, unless it wants none, and for its siblings."""
        ready = [(i, drawn) for i, result in enumerate(results) if _is_ready(result) for drawn in _drawn_from(result)]
        for start, end in self._chunks(0, len(ready)):
            chunk = ready[start:end]
            rows = torch.tensor([offsets[i + 1] - 1 for i, _ in chunk], device=hidden.device)
            logits = self.model.logits(hidden.index_select(0, rows))
            ids = sample(logits, [_sample_row(sequence) for _, sequence in chunk])
            entries = _token_logprobs(logits, ids, [sequence.request.logprobs for _, sequence in chunk])
            for (i, _), entry in zip(chunk, entries, strict=True):
                results[i].tokens.append(entry)

    def _read_latents(self, results: list[WindowResult]) -> None:
        """Put by the latents that are wanted, before the sequence may end and lose its blocks."""
        for result in results:
            sequence = result.window.sequence
            wanted, end = sequence.request.latents, sequence.num_tokens
            if wanted is None or result.window.start + result.num_settled < end:
                continue
            start = 0 if wanted == "all" and sequence.num_output_tokens == 0 else end - 1
            slots = slots_of(sequence.block_table, start, end, self.config.block_size)
            rows = self.pool.load_memory(torch.tensor(slots, device=self.pool.latents.device))
            result.latents = rows.float().cpu().numpy().tobytes()

    def _cached_part(self, result: WindowResult) -> Scoring:
        """What came from the prefix cache is scored by its latents, which are the hidden states."""
        assert self.model.config.latents_are_hidden
        window, start = result.window, len(result.window.sequence.prompt_logprobs)
        slots = slots_of(window.sequence.block_table, start, start + window.num_scored, self.config.block_size)
        return Scoring(result, start, self.pool.load_memory(torch.tensor(slots, device=self.pool.latents.device)))

    def _score(self, scorings: SequenceABC[Scoring]) -> None:
        """Logprobs of the prompt tokens behind scored positions: rows of all prompts go through the head together."""
        rows = [(one.result, one.start + row) for one in scorings for row in range(len(one.hidden))]
        if not rows:
            return
        hidden = torch.cat([one.hidden for one in scorings])
        for start, end in self._chunks(0, len(rows)):
            self._score_chunk(rows[start:end], hidden[start:end])

    def _score_chunk(self, rows: SequenceABC[tuple[WindowResult, int]], hidden: Tensor) -> None:
        """A function of its own, so that a chunk's logits are gone before the next one's are made."""
        sequences = [result.window.sequence for result, _ in rows]
        logits = self.model.logits(hidden)
        behind = [sequence.token_ids[position + 1] for sequence, (_, position) in zip(sequences, rows, strict=True)]
        ids = torch.tensor(behind, device=logits.device)
        entries = _token_logprobs(logits, ids, [sequence.request.prompt_logprobs for sequence in sequences])
        ranks = 1 + (logits > logits.gather(-1, ids.unsqueeze(-1))).sum(-1)
        for (result, _), entry, rank in zip(rows, entries, ranks.tolist(), strict=True):
            result.prompt_logprobs.append(entry._replace(rank=rank))

    def _chunks(self, start: int, end: int) -> list[tuple[int, int]]:
        """start..end - 1 in parts of as many rows as logits may have."""
        size = logits_rows(self.model.config.vocab_size)
        return [(first, min(first + size, end)) for first in range(start, end, size)]

    def _copy_blocks(self, copies: SequenceABC[Copy]) -> None:
        """Carry out copies of whole blocks, in order."""
        size = self.config.block_size
        for source, target in copies:
            for storage in (*self.pool.keys, *self.pool.values, self.pool.latents):
                storage[target * size : (target + 1) * size] = storage[source * size : (source + 1) * size]


def _settled_parts(offsets: list[int], results: list[WindowResult], hidden: Tensor) -> list[Scoring]:
    """The settled positions, hidden [T, D], of prompts whose logprobs are asked for; those scored before a preemption are not
    scored again."""
    parts = []
    for result, offset in zip(results, offsets, strict=False):
        sequence, start = result.window.sequence, result.window.start
        if sequence.request.prompt_logprobs is not None:
            first = max(len(sequence.prompt_logprobs), start)
            end = min(start + result.num_settled, sequence.num_prompt_tokens - 1)
            if first < end:
                parts.append(Scoring(result, first, hidden[offset + first - start : offset + end - start]))
    return parts


def _is_ready(result: WindowResult) -> bool:
    sequence = result.window.sequence
    settled = result.window.start + result.num_settled
    return settled == sequence.num_tokens and sequence.num_tokens < sequence.max_num_tokens


def _drawn_from(result: WindowResult) -> list[Sequence]:
    """The sequences that draw their next token from the window's last settled row."""
    return [result.window.sequence, *result.window.sequence.siblings]


def _sample_row(sequence: Sequence) -> SampleRow:
    params, num_outputs = sequence.request.sampling, sequence.num_output_tokens
    forbidden = tuple(sequence.end_ids) if num_outputs < sequence.request.stopping.min_tokens else ()
    tail = sequence.last_output_ids(params.longest_bad_word) if params.bad_words else ()
    history = sequence.count_outputs() if params.needs_history else None
    permitted = sequence.grammar.permitted() if sequence.grammar is not None else None
    return SampleRow(params, sequence.seed, num_outputs, (), tail, forbidden, history, permitted)


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
