"""The training loop: batch, schedule, backward, clip, guard, optimizer; log, evaluate, save; on one or several ranks.

A run lives in its own folder (`state.py` says what lies there) and stops only between steps, with its state saved, so that
resuming repeats nothing and loses nothing. Several ranks share a batch's rows, agree on its loss, on the time and on when
to stop, and train as one process would. Neighbours: `config.py`, `packing.py`, `optimizer.py`, `guards.py`, `evaluate.py`,
`distributed.py`, `finish.py`, which makes a checkpoint of the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt_core.files import write_json
from lrt_core.hardware import has_fast_bf16
from lrt_core.model import LatentRecurrentTransformer, Layer
from lrt_core.tokenizer import Tokenizer
from training.config import Precision, TrainingConfig
from training.data import Corpus, ShardedCorpus
from training.distributed import ALONE, Ranks, Silent, clip_gradients
from training.evaluate import parallel_bpb
from training.gradients import Gradients
from training.guards import Guard
from training.initial import initialize
from training.optimizer import Optimizer, lr_scale
from training.packing import Packer, Position, evaluation_rows
from training.progress import Progress
from training.run_folder import load_run_config, load_run_tokenizer, write_settings
from training.schedules.registry import entry
from training.sinks import Sink
from training.state import (
    CONFIG_FILE,
    LOG_FILE,
    TrainingState,
    Which,
    best_bpb,
    load_state,
    save_state,
)


class TrainingError(ValueError):
    """A run that cannot go on; the message says why and what to do."""


class StepResult(NamedTuple):
    """loss: mean over the forwards, nats per token; bpb: of the merged forwards; grad_norm: before clipping.

    lr_scale: factor on the learning rates. skipped: why no weight was changed, "" for a step that was taken.
    """

    loss: float
    bpb: float
    grad_norm: float
    lr_scale: float
    skipped: str = ""


class Trainer:
    """One run over a corpus. `step` advances it by one optimizer step, `run` to its end; all ranks call them alike.

    sharded: each of the ranks holds its part of the model. init_from: a checkpoint whose weights it starts with.
    """

    def __init__(
        self,
        config: TrainingConfig,
        run: Path,
        corpus: Corpus | ShardedCorpus,
        tokenizer: Tokenizer,
        device: torch.device | None = None,
        *,
        ranks: Ranks = ALONE,
        sharded: bool = False,
        init_from: Path | None = None,
    ) -> None:
        _check_divisible(config, ranks)
        self.config, self.run_folder, self.corpus, self.tokenizer = config, run, corpus, tokenizer
        self.device, self.ranks, self.sharded = device or torch.device("cpu"), ranks, sharded
        self.schedule = config.make_schedule()
        self.model = LatentRecurrentTransformer(config.model)
        if init_from is None:
            self.model.init_weights(torch.Generator().manual_seed(config.seed))
        else:
            initialize(self.model, init_from)
        prepare(self.model, config.compile, config.recompute)
        if sharded:
            from training.fsdp import shard

            shard(self.model, ranks, self.device)
        else:
            self.model.to(self.device)
        self.guard = Guard(config.guard, config.optimizer.clip_norm)
        self.packer = Packer(corpus.train, tokenizer, config.model.sequence_len, config.batch_size, config.seed)
        sizes = config.model.sequence_len, config.eval_rows
        rows = evaluation_rows(corpus.validation, tokenizer, *sizes, fill=config.fill_eval_rows)
        self.eval_rows = rows.to(self.device)
        self.byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=self.device)
        bfloat16 = uses_bfloat16(config.precision, self.device)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=bfloat16)
        """Makes the precision of forwards and backwards."""
        self.gradients = Gradients(
            self.model,
            self.schedule,
            self.byte_lengths,
            ranks,
            self.autocast,
            accumulate=config.accumulate,
            sharded=sharded,
            graphed=config.cuda_graphs and not config.compile and entry(config.schedule).is_fixed,
        )
        self.num_steps_done, self.elapsed = 0, 0.0
        self.stop_requested = False
        self.damaged_states: list[str] = []
        self._saved_step, self._evaluation = -1, (-1, math.inf)

    @cached_property
    def optimizer(self) -> Optimizer:
        """Made when it is needed: what only finishes a run does without, and so without its memory."""
        if self._model_alone:
            raise TrainingError(f"{self.run_folder}: was loaded to be finished, without its optimizer, and cannot train on")
        muon_dtype = torch.bfloat16 if uses_bfloat16(self.config.precision, self.device) else torch.float32
        return Optimizer(self.model, self.config.optimizer, muon_dtype)

    @classmethod
    def create(
        cls,
        config: TrainingConfig,
        run: Path,
        corpus: Corpus | ShardedCorpus,
        tokenizer: Tokenizer,
        command: str,
        device: torch.device | None = None,
    ) -> Trainer:
        """A new run in an empty or new folder; command: what started it. StateError when a run lies there already."""
        write_settings(config, run, tokenizer, command)
        return cls(config, run, corpus, tokenizer, device)

    @classmethod
    def resume(
        cls,
        run: Path,
        corpus: Corpus | ShardedCorpus,
        device: torch.device | None = None,
        *,
        ranks: Ranks = ALONE,
        sharded: bool = False,
        which: Which = "last",
        accumulate: int | None = None,
        config: TrainingConfig | None = None,
        to_finish: bool = False,
    ) -> Trainer:
        """The run as it was saved last, or best; on other ranks, sharded or not, and in other parts than before as it comes.

        config: the run's own with other learning rates or guards, which the run keeps from here on. to_finish: load the model
        alone, for `finish`; it cannot train on. Damaged states are passed over and named in `damaged_states`; StateError or
        CheckpointError when nothing is left.
        """
        stored = load_run_config(run)
        kept = config or stored
        parts = replace(kept, accumulate=accumulate or kept.accumulate)
        trainer = cls(parts, run, corpus, load_run_tokenizer(run), device, ranks=ranks, sharded=sharded)
        trainer._restore(which, to_finish)
        if kept != stored:
            ranks.on_first(lambda: write_json(run / CONFIG_FILE, kept.to_dict()))
        return trainer

    def _tensors(self, model_alone: bool = False) -> dict[str, Tensor]:
        """Everything that a state holds beside plain data; the model's and the optimizer's are the live ones."""
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if model_alone:
            return model
        return {
            **model,
            **{f"optimizer.{name}": tensor for name, tensor in self.optimizer.tensors().items()},
            "rng": torch.get_rng_state(),
        }

    def _restore(self, which: Which, model_alone: bool) -> None:
        tensors = self._tensors(model_alone)
        state, self.damaged_states = load_state(self.run_folder, tensors, self.ranks, which)
        self.num_steps_done, self.elapsed, self._saved_step = state.step, state.elapsed, state.step
        self.guard.load_state_dict(state.guard)
        self.data_changed = state.data_fingerprint != self.corpus.fingerprint()
        position = Position.from_dict(state.position)
        # A position counts documents; among others it means nothing, so changed data begins a new epoch.
        self.packer.position = Position(position.epoch + 1) if self.data_changed else position
        if self.data_changed:
            self.guard.forget()
        self._model_alone = model_alone
        if not model_alone:
            torch.set_rng_state(tensors["rng"])

    _model_alone = False
    data_changed = False
    """Whether the corpus differs from the one the run was saved with: it goes on, but not as it would have."""

    @property
    def num_tokens_done(self) -> int:
        """Tokens trained on so far, each counted once a step whatever the schedule."""
        return self.num_steps_done * self.config.batch_size * self.config.model.sequence_len

    @property
    def progress(self) -> float:
        """Part of the run that is done, 0..1, by steps or by time, whichever is more."""
        by_steps = self.num_steps_done / self.config.num_steps
        by_time = self.elapsed / self.config.time_budget if self.config.time_budget is not None else 0.0
        return min(1.0, max(by_steps, by_time))

    def step(self) -> StepResult:
        """One optimizer step; or, where the guard objects, a batch that changes no weight and counts for no step."""
        started = time.monotonic()
        in_warmdown = self.progress >= 1.0 - self.config.warmdown
        self.packer.cut_share = self.config.prompt_cuts if in_warmdown else 0.0
        loss, nats, num_bytes = self.gradients(*self.packer.batch(self.ranks.rows(self.config.batch_size)))
        self._reshard()
        norm, scale = clip_gradients(self.model, self.config.optimizer.clip_norm), self._lr_scale()
        skipped = self.guard.judge(loss, norm)
        self.guard.record(loss, norm, bool(skipped))
        if skipped:
            self.model.zero_grad(set_to_none=True)
        else:
            self.optimizer.step(scale)
            self.num_steps_done += 1
        self.elapsed += time.monotonic() - started
        return StepResult(loss, nats / (math.log(2) * num_bytes), norm, scale, skipped)

    def _reshard(self) -> None:
        """Let go of what forwards left whole of a sharded model."""
        if self.sharded:
            from training.fsdp import reshard

            reshard(self.model)

    def _lr_scale(self) -> float:
        """Of the coming step, by the progress at its middle, so that neither the first nor the last step has rate zero."""
        progress = min(1.0, self.progress + 0.5 / self.config.num_steps)
        return self.config.optimizer.lr_scale * lr_scale(progress, self.config.warmup, self.config.warmdown)

    def evaluate(self) -> dict[str, Any]:
        """Parallel BPB on the validation rows, as plain data for the log."""
        with self.autocast():
            bpb = self.ranks.first(parallel_bpb(self.model, self.schedule, self.eval_rows, self.byte_lengths))
        self._reshard()
        return {"step": self.num_steps_done, "bpb": bpb.merged, "bpb_per_pass": bpb.passes}

    def save(self) -> None:
        """Write the state that `resume` reads, unless it is there already; StateError when it cannot be written."""
        if self._saved_step == self.num_steps_done:
            return
        step, bpb = self._evaluation
        state = TrainingState(
            step=self.num_steps_done,
            elapsed=self.elapsed,
            position=self.packer.position.to_dict(),
            data_fingerprint=self.corpus.fingerprint(),
            guard=self.guard.state_dict(),
            bpb=bpb if step == self.num_steps_done and math.isfinite(bpb) else None,
        )
        save_state(self.run_folder, state, self._tensors(), self.ranks, self.config.keep_last, self.config.keep_best)
        self._saved_step = self.num_steps_done

    def run(self, sinks: Sequence[Sink] = ()) -> bool:
        """Train to the end, or until `stop_requested` is set; the state is saved either way. True when the end was reached.

        sinks: of the first rank. TrainingError when too many steps had to be skipped; the state saved last is left as it is.
        """
        log = self.run_folder / LOG_FILE
        with Progress(log, sinks, self.num_steps_done) if self.ranks.is_first else Silent() as progress:
            progress.log(
                "start",
                step=self.num_steps_done,
                data_changed=self.data_changed,
                skipped=self.corpus.num_skipped,
                ranks=self.ranks.size,
                damaged_states=self.damaged_states,
            )
            if self.num_steps_done == 0:
                self.save()  # so that even a run that goes wrong at once can be resumed
            while self._goes_on():
                result = self.step()
                if result.skipped:
                    self._report_skip(progress, result)
                else:
                    self._report(progress, result)
                    self._periodic(progress)
            if self.progress >= 1.0 and self.num_steps_done not in (self._saved_step, self._evaluation[0]):
                self._validate(progress)  # a skipped step took the last of the time
            self.save()
            progress.log("stop", step=self.num_steps_done, elapsed=round(self.elapsed, 3), finished=self.progress >= 1.0)
        return self.progress >= 1.0

    def _goes_on(self) -> bool:
        """Whether to make another step: the ranks go by the first one's clock, and stop when any of them is asked to."""
        elapsed, num_stopping = self.ranks.sum([self.elapsed if self.ranks.is_first else 0.0, self.stop_requested])
        self.elapsed = elapsed
        return self.progress < 1.0 and not num_stopping

    def _report_skip(self, progress: Progress | Silent, result: StepResult) -> None:
        """Log a skipped step; TrainingError when it was one too many."""
        step, total = self.num_steps_done + 1, self.guard.num_skipped
        values = {"loss": result.loss, "grad_norm": result.grad_norm, "reason": result.skipped}
        progress.log("skipped", step=step, tokens=self.num_tokens_done, skipped=total, **values)
        progress.say(f"step {step}: skipped: {result.skipped}")
        if self.guard.gives_up:
            progress.log("stop", step=self.num_steps_done, elapsed=round(self.elapsed, 3), finished=False, gave_up=True)
            smaller = f"lrt-train --resume {self.run_folder} --lr-scale {self.config.optimizer.lr_scale / 2:g}"
            raise TrainingError(self.guard.advice(step, result.skipped, self._saved_step, smaller))

    def _report(self, progress: Progress | Silent, result: StepResult) -> None:
        speed, skipped = self.num_tokens_done / self.elapsed, self.guard.num_skipped
        left = self.elapsed / self.progress - self.elapsed
        progress.show(self.progress, self.num_steps_done, result.loss, result.bpb, speed, left, skipped)
        if self.num_steps_done % self.config.log_every == 0:
            progress.log(
                "step",
                step=self.num_steps_done,
                tokens=self.num_tokens_done,
                loss=result.loss,
                bpb=result.bpb,
                grad_norm=result.grad_norm,
                lr_scale=round(result.lr_scale, 6),
                skipped=skipped,
                tokens_per_second=round(speed, 1),
                elapsed=round(self.elapsed, 3),
            )

    def _periodic(self, progress: Progress | Silent) -> None:
        started, is_best = time.monotonic(), False
        if self.num_steps_done % self.config.eval_every == 0:
            is_best = self._validate(progress)
            self.elapsed += time.monotonic() - started
        elif self.ranks.first(self.progress >= 1.0):  # the end can be the best, too; it takes none of the training's time
            is_best = self._validate(progress)
        if self.num_steps_done % self.config.save_every == 0 or is_best:
            self.save()

    def _validate(self, progress: Progress | Silent) -> bool:
        """Evaluate, and log it; whether the state is to be kept as the best so far."""
        result = self.evaluate()
        progress.log("evaluation", **result)
        progress.say(f"step {self.num_steps_done}: validation bpb {result['bpb']:.4f}")
        self._evaluation = self.num_steps_done, result["bpb"]
        return self.config.keep_best and self.ranks.first(result["bpb"] < best_bpb(self.run_folder))


def _check_divisible(config: TrainingConfig, ranks: Ranks) -> None:
    parts = ranks.size * config.accumulate
    if config.batch_size % parts:
        raise TrainingError(
            f"batch_size {config.batch_size} must be a multiple of {parts}: {ranks.size} rank(s) take equal shares of a batch, "
            f"each in {config.accumulate} part(s)"
        )


def prepare(model: LatentRecurrentTransformer, compile: bool, recompute: bool) -> None:
    """Make the model train as told: layers compiled, or holding no more than their inputs for the backward."""
    model.recompute = recompute
    if compile:
        for layer in model.layers:
            assert isinstance(layer, Layer)
            layer.compile_parts()


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether forwards run in bfloat16: as told, or with `auto` where the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bfloat16"
    return device.type in ("cpu", "cuda") and has_fast_bf16(device)
