"""The synchronous engine: takes requests, steps, hands out tokens. One thread owns it; `async_engine.py` is its front door."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from lrt_core.config import ModelConfig
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.model_runner import ModelRunner, WindowResult
from server.engine.request import FinishReason, GenerationRequest, PromptTooLongError, RequestError, TokenLogprob
from server.engine.scheduler import ScheduledWindow, Scheduler, Totals, scored_per_row
from server.engine.sequence import Sequence, Status
from server.engine.stats import StepStats


@dataclass(slots=True)
class SequenceOutput:
    """What a step has for the consumer of one sequence: a token, its end, or both; an end carries the prompt's logprobs if the
    sequence never generated."""

    sequence: Sequence
    token: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    """The whole prompt's entries, with the first output of a sequence that asked for them."""
    finish_reason: FinishReason | None = None
    latents: bytes | None = None
    """Of the last computed token, or, with the first output where all are wanted, of the whole prompt; if asked for."""
    error: str | None = None
    """Why the sequence could not go on, whose token was then none; the reason is `abort`."""


@dataclass
class StepOutput:
    """Everything one step produced. started: sequences that it was the first to serve."""

    started: list[Sequence] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)
    stats: StepStats = field(default_factory=StepStats)


class Engine:
    """Scheduler, blocks and model in one place.

    eos_ids end a sequence unless it ignores them. With check_invariants every step ends with a check that queues, reference
    counts, free list, hashes, block tables and latent rows agree (a failed one is a bug: AssertionError).
    """

    def __init__(
        self,
        runner: ModelRunner,
        eos_ids: Collection[int],
        check_invariants: bool = False,
        seed: int | None = None,
        weights_id: str = "",
    ) -> None:
        self.runner, self.config = runner, runner.config
        self.eos_ids = frozenset(eos_ids)
        self.weights_id = weights_id
        root = f"{weights_id} {runner.model.dtype} {self.config.prefill} {self.config.window} {self.config.tolerance}"
        root_or_none = root if self.config.prefix_caching else None
        self.blocks = BlockManager(self.config.num_blocks, self.config.block_size, root_or_none)
        model = runner.model.config
        self.scheduler = Scheduler(self.config, self.blocks, model.latents_are_hidden, scored_per_row(model))
        self.check_invariants = check_invariants
        self._random = random.Random(seed)
        self._numbers = itertools.count()

    def check(self, request: GenerationRequest) -> None:
        """Raise PromptTooLongError or RequestError for a request that can never be served."""
        check_request(self.config, self.runner.model.config, request, self._end_ids(request))

    def add(self, request: GenerationRequest) -> list[Sequence]:
        """Queue the request's samples, of which the first reads the prompt for all; without a seed a request draws one."""
        self.check(request)
        seed = request.sampling.seed if request.sampling.seed is not None else self._random.getrandbits(63)
        ends = self._end_ids(request)
        sequences = [Sequence(request, index, seed + index, next(self._numbers), ends) for index in range(request.n)]
        self._lead(sequences)
        return sequences

    def _end_ids(self, request: GenerationRequest) -> frozenset[int]:
        stopping = request.stopping
        return (frozenset() if stopping.ignore_eos else self.eos_ids) | frozenset(stopping.stop_token_ids)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence from outside (its client is gone, a stop string matched); a finished one stays as it is."""
        self.scheduler.finish(sequence, reason)
        siblings, sequence.siblings = sequence.siblings, []
        self._lead([sibling for sibling in siblings if not sibling.finished])

    def _lead(self, sequences: list[Sequence]) -> None:
        """Queue the first sequence and let the others wait for it to read their common prompt."""
        if sequences:
            leader, *leader.siblings = sequences
            for sibling in leader.siblings:
                sibling.status = Status.HELD
            self.scheduler.add(leader)

    def has_work(self) -> bool:
        """Whether a step would do anything (samples that wait for a sibling imply that the sibling is at work)."""
        return self.scheduler.has_work()

    def step(self) -> StepOutput:
        """Run one step over what is scheduled."""
        started = time.monotonic()
        before = replace(self.scheduler.totals)
        windows = self.scheduler.schedule()
        copies, self.blocks.copies = self.blocks.copies, []
        output = StepOutput()
        if windows:
            output.started = self._note_start(windows, started)
            results = self.runner.execute(windows, copies)
            self._count(results, output.stats)
            for result in results:
                self._advance(result, output)
            output.stats.step_seconds = time.monotonic() - started
        self._fill_totals(output.stats, before)
        self.fill_gauges(output.stats)
        if self.check_invariants:
            self.scheduler.check_invariants()
            self.runner.check_invariants(self.scheduler.running, self.blocks.named_blocks)
        return output

    def _note_start(self, windows: list[ScheduledWindow], now: float) -> list[Sequence]:
        """Put down when each sequence was first served, and drop siblings that have ended; returns the new sequences."""
        new = []
        for window in windows:
            sequence = window.sequence
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
                new.append(sequence)
                self._start_grammars([sequence, *sequence.siblings])
            if sequence.siblings:
                sequence.siblings = [sibling for sibling in sequence.siblings if not sibling.finished]
        return new

    def _start_grammars(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            grammar = sequence.request.grammar
            if grammar is not None and sequence.grammar is None:
                sequence.grammar = grammar.start(may_end=self._may_end(sequence))

    def _may_end(self, sequence: Sequence) -> bool:
        """Whether an end-of-sequence id ends it."""
        return bool(self.eos_ids) and not sequence.request.stopping.ignore_eos

    def _fill_totals(self, stats: StepStats, before: Totals) -> None:
        now = self.scheduler.totals
        stats.num_preemptions = now.num_preemptions - before.num_preemptions
        stats.num_recomputed_tokens = now.num_recomputed_tokens - before.num_recomputed_tokens
        stats.num_prefix_queries = now.num_prefix_queries - before.num_prefix_queries
        stats.num_prefix_hits = now.num_prefix_hits - before.num_prefix_hits

    def fill_gauges(self, stats: StepStats) -> None:
        """Write the queues' lengths and the pool's usage into `stats`."""
        stats.num_running, stats.num_waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        stats.kv_cache_usage = self.blocks.usage

    def _count(self, results: list[WindowResult], stats: StepStats) -> None:
        for result in results:
            window, sequence = result.window, result.window.sequence
            stats.num_scheduled_tokens += window.num_tokens
            stats.num_scored_tokens += window.num_scored
            if result.residual is not None and math.isfinite(result.residual):
                stats.refinement_residuals.append(result.residual)
            num_prompt_tokens = sequence.num_prompt_tokens
            if sequence.num_counted_prompt_tokens == num_prompt_tokens:
                continue
            settled = window.start + result.num_settled
            num_new = min(settled, num_prompt_tokens) - sequence.num_counted_prompt_tokens
            if num_new > 0:
                stats.num_settled_prompt_tokens += num_new
                sequence.num_counted_prompt_tokens += num_new
                if settled >= num_prompt_tokens:
                    rows = sequence.num_computed_rows + window.num_tokens
                    stats.refinement_passes.append(rows / (settled - sequence.num_cached_tokens))

    def _advance(self, result: WindowResult, output: StepOutput) -> None:
        """Apply one window's result to its sequence; when that has read its prompt, its siblings set out too."""
        window, sequence = result.window, result.window.sequence
        if window.num_tokens:
            sequence.advance(result.num_settled, window.num_tokens)
        if not result.is_finite:
            self._give_up([sequence, *sequence.siblings], output)
            return
        self.blocks.register(sequence)
        if result.prompt_logprobs:
            sequence.prompt_logprobs += result.prompt_logprobs
        if sequence.num_uncomputed_tokens > 0:
            return
        siblings, sequence.siblings = sequence.siblings, []
        tokens: list[TokenLogprob | None] = [*result.tokens] or [None] * (1 + len(siblings))
        outputs = [self._take_token(sequence, tokens[0])]
        for sibling, token in zip(siblings, tokens[1:], strict=True):
            sibling.prompt_logprobs = sequence.prompt_logprobs
            if sibling.first_scheduled is None:
                sibling.first_scheduled = sequence.first_scheduled
                output.started.append(sibling)
            sibling.num_cached_prompt_tokens = sequence.num_cached_prompt_tokens
            sibling.num_counted_prompt_tokens = sequence.num_counted_prompt_tokens
            outputs.append(self._take_token(sibling, token))
            if outputs[-1].finish_reason is None:
                self.scheduler.fork(sequence, sibling)
        for item in outputs:
            item.latents = result.latents
            if item.finish_reason is not None:
                self.scheduler.finish(item.sequence, item.finish_reason)
        output.outputs += outputs

    def _give_up(self, sequences: list[Sequence], output: StepOutput) -> None:
        """End samples whose states are no numbers; nothing of these is kept, for others to find or to read past their ends."""
        first = sequences[0]
        unsettled = first.block_table[first.num_registered_blocks :]
        self.runner.clear([block for block in unsettled if self.blocks.ref_counts[block] == 1])
        for sequence in sequences:
            if not sequence.finished:
                sequence.siblings = []
                self.scheduler.finish(sequence, "abort")
                output.outputs.append(SequenceOutput(sequence, None, finish_reason="abort", error=NOT_FINITE))

    def _take_token(self, sequence: Sequence, token: TokenLogprob | None) -> SequenceOutput:
        """Append the token (none when the prompt alone was to be read) and say whether that was the last."""
        output = SequenceOutput(sequence, token)
        if sequence.num_output_tokens == 0 and sequence.request.prompt_logprobs is not None:
            first = TokenLogprob(sequence.token_ids[0], None)
            output.prompt_logprobs = [first, *sequence.prompt_logprobs]
        if token is not None:
            sequence.token_ids.append(token.token_id)
        output.finish_reason = self._finish_reason(sequence, token)
        if sequence.grammar is not None and sequence.grammar.error is not None:
            output.token, output.finish_reason, output.error = None, "abort", sequence.grammar.error
        return output

    def _finish_reason(self, sequence: Sequence, token: TokenLogprob | None) -> FinishReason | None:
        if token is not None and token.token_id in sequence.end_ids:
            return "stop"
        if token is not None and sequence.grammar is not None:
            sequence.grammar.accept(token.token_id)
            if not self._may_end(sequence) and sequence.grammar.is_exhausted:
                return "stop"
        return "length" if sequence.num_tokens >= sequence.max_num_tokens else None


NOT_FINITE = "the model's states came to be no numbers"
"""What is said of a sample that ends for it."""


def check_request(config: EngineConfig, model: ModelConfig, request: GenerationRequest, end_ids: Collection[int]) -> None:
    """Raise PromptTooLongError or RequestError for a request that an engine of this configuration and model can never serve.

    end_ids: ids that end its samples.
    """
    num_prompt, max_tokens = len(request.prompt_ids), request.stopping.max_tokens
    if num_prompt == 0:
        raise RequestError("the prompt is empty")
    if max_tokens < 0 or request.n < 1:
        raise RequestError("max_tokens must be at least 0 and n at least 1", param="max_tokens" if max_tokens < 0 else "n")
    if request.n > config.max_num_admitted:
        raise RequestError(f"n is {request.n}, the server takes {config.max_num_admitted} samples in all", param="n")
    if request.latents is not None and model.recurrence is None:
        raise RequestError("a plain transformer has no latents", param="latents")
    _check_ids(model.vocab_size, request)
    _check_choice(model.vocab_size, request, end_ids)
    _check_room(config, request)


def _check_ids(vocab_size: int, request: GenerationRequest) -> None:
    ranges = {"prompt": (min(request.prompt_ids), max(request.prompt_ids)), **request.sampling.id_ranges}
    if stop_ids := request.stopping.stop_token_ids:
        ranges["stop_token_ids"] = min(stop_ids), max(stop_ids)
    for param, (smallest, largest) in ranges.items():
        if smallest < 0 or largest >= vocab_size:
            outside = smallest if smallest < 0 else largest
            raise RequestError(f"token id {outside} lies outside 0..{vocab_size - 1}", param=param)


def _check_choice(vocab_size: int, request: GenerationRequest, end_ids: Collection[int]) -> None:
    """Raise RequestError where a step might come to forbid every token."""
    sampling = request.sampling
    forbidden = sampling.ends_of_bad_words
    if request.stopping.min_tokens > 0:
        forbidden = forbidden.union(end_ids)
    allowed = sampling.allowed_token_ids
    if len(forbidden) >= vocab_size or (allowed is not None and forbidden.issuperset(allowed)):
        param = "bad_words" if allowed is None else "allowed_token_ids"
        raise RequestError("bad_words and min_tokens may forbid every token that is allowed; allow others", param=param)


def _check_room(config: EngineConfig, request: GenerationRequest) -> None:
    num_prompt, max_tokens = len(request.prompt_ids), request.stopping.max_tokens
    if request.stopping.min_tokens > max_tokens:
        told = f"min_tokens is {request.stopping.min_tokens}, and only {max_tokens} may be generated behind this prompt"
        raise RequestError(told, param="min_tokens")
    if num_prompt + max_tokens > config.max_model_len:
        raise PromptTooLongError(
            f"This model's maximum context length is {config.max_model_len} tokens. However, you requested "
            f"{num_prompt + max_tokens} tokens ({num_prompt} in the prompt, {max_tokens} to generate)."
        )
    if num_prompt + max_tokens > config.capacity:
        raise RequestError(
            f"the request needs {num_prompt + max_tokens} tokens of cache, the server has {config.capacity} in all; "
            "shorten it or start the server with a larger --kv-cache-memory"
        )
