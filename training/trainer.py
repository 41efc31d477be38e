"""The training loop: batch, schedule, backward, clip, guard, optimizer; log, evaluate, save.

A run lives in its own folder (`state.py` says what lies there) and stops only between steps, with its state saved, so that
resuming repeats nothing and loses nothing. Neighbours: `config.py`, `packing.py`, `optimizer.py`, `guards.py`,
`evaluate.py`, `finish.py`, which makes a checkpoint of the result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

from lrt_core.files import read_json, write_json, write_text
from lrt_core.hardware import has_fast_bf16
from lrt_core.model import LatentRecurrentTransformer, Layer
from lrt_core.tokenizer import Tokenizer
from training.config import Precision, TrainingConfig
from training.data import Corpus
from training.evaluate import bits_per_byte, merge, parallel_bpb
from training.guards import Guard
from training.optimizer import Optimizer, lr_scale
from training.packing import Packer, Position, evaluation_rows
from training.progress import Progress
from training.sinks import Sink
from training.state import (
    COMMAND_FILE,
    CONFIG_FILE,
    LOG_FILE,
    STATE_FILE,
    TOKENIZER_FOLDER,
    StateError,
    TrainingState,
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
    """One run over a corpus. `step` advances it by one optimizer step, `run` to its end."""

    def __init__(
        self, config: TrainingConfig, run: Path, corpus: Corpus, tokenizer: Tokenizer, device: torch.device | None = None
    ) -> None:
        self.config, self.run_folder, self.corpus, self.tokenizer = config, run, corpus, tokenizer
        self.device = device or torch.device("cpu")
        self.schedule = config.make_schedule()
        self.model = LatentRecurrentTransformer(config.model)
        self.model.init_weights(torch.Generator().manual_seed(config.seed))
        self.model.to(self.device)
        prepare(self.model, config.compile, config.recompute)
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.guard = Guard(config.guard, config.optimizer.clip_norm)
        self.packer = Packer(corpus.train, tokenizer, config.model.sequence_len, config.batch_size, config.seed)
        rows = evaluation_rows(corpus.validation, tokenizer, config.model.sequence_len, config.eval_rows)
        self.eval_rows = rows.to(self.device)
        self.byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=self.device)
        self.num_steps_done, self.num_steps_saved, self.elapsed = 0, 0, 0.0
        self.stop_requested = False

    @classmethod
    def create(
        cls,
        config: TrainingConfig,
        run: Path,
        corpus: Corpus,
        tokenizer: Tokenizer,
        command: str,
        device: torch.device | None = None,
    ) -> Trainer:
        """A new run in an empty or new folder; command: what started it. StateError when a run lies there already."""
        check_is_new(run)
        (run / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
        tokenizer.save(run / TOKENIZER_FOLDER)
        write_json(run / CONFIG_FILE, config.to_dict())
        write_text(run / COMMAND_FILE, command + "\n")
        return cls(config, run, corpus, tokenizer, device)

    @classmethod
    def resume(
        cls, run: Path, corpus: Corpus, device: torch.device | None = None, config: TrainingConfig | None = None
    ) -> Trainer:
        """The run as it was last saved; StateError or CheckpointError when a file is missing or damaged.

        config: the run's own with other learning rates or guards, which the run keeps from here on.
        """
        stored = load_run_config(run)
        trainer = cls(config or stored, run, corpus, Tokenizer.from_directory(run / TOKENIZER_FOLDER), device)
        trainer._restore(load_state(run))
        if trainer.config != stored:
            write_json(run / CONFIG_FILE, trainer.config.to_dict())
        return trainer

    def _restore(self, state: TrainingState) -> None:
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        self.num_steps_done, self.elapsed = state.step, state.elapsed
        self.num_steps_saved = state.step
        self.guard.load_state_dict(state.guard)
        self.data_changed = state.data_fingerprint != self.corpus.fingerprint()
        position = Position.from_dict(state.position)
        # A position counts documents; among others it means nothing, so changed data begins a new epoch.
        self.packer.position = Position(position.epoch + 1) if self.data_changed else position
        if self.data_changed:
            self.guard.forget()
        torch.set_rng_state(state.rng)

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
        tokens, targets = (part.to(self.device) for part in self.packer.batch())
        with self.autocast():
            losses = self.schedule(self.model, tokens, targets)
        losses.total.backward()  # type: ignore[no-untyped-call]
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        loss, norm, scale = losses.total.item(), grad_norm.item(), self._lr_scale()
        skipped = self.guard.judge(loss, norm)
        self.guard.record(loss, norm, bool(skipped))
        if skipped:
            self.model.zero_grad(set_to_none=True)
        else:
            self.optimizer.step(scale)
            self.num_steps_done += 1
        self.elapsed += time.monotonic() - started
        with torch.no_grad():
            return StepResult(loss, bits_per_byte(merge(losses.passes), targets, self.byte_lengths), norm, scale, skipped)

    def _lr_scale(self) -> float:
        """Of the coming step, by the progress at its middle, so that neither the first nor the last step has rate zero."""
        progress = min(1.0, self.progress + 0.5 / self.config.num_steps)
        return self.config.optimizer.lr_scale * lr_scale(progress, self.config.warmup, self.config.warmdown)

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of forwards and backwards."""
        enabled = uses_bfloat16(self.config.precision, self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def evaluate(self) -> dict[str, object]:
        """Parallel BPB on the validation rows, as plain data for the log."""
        with self.autocast():
            bpb = parallel_bpb(self.model, self.schedule, self.eval_rows, self.byte_lengths)
        return {"step": self.num_steps_done, "bpb": bpb.merged, "bpb_per_pass": bpb.passes}

    def save(self) -> None:
        """Write the state that `resume` reads."""
        state = TrainingState(
            step=self.num_steps_done,
            elapsed=self.elapsed,
            position=self.packer.position.to_dict(),
            data_fingerprint=self.corpus.fingerprint(),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            rng=torch.get_rng_state(),
            guard=self.guard.state_dict(),
        )
        save_state(self.run_folder, state)
        self.num_steps_saved = self.num_steps_done

    def run(self, sinks: Sequence[Sink] = ()) -> bool:
        """Train to the end, or until `stop_requested` is set; the state is saved either way. True when the end was reached.

        TrainingError when too many steps had to be skipped; the state saved last is then left as it is.
        """
        with Progress(self.run_folder / LOG_FILE, sinks, self.num_steps_done) as progress:
            progress.log("start", step=self.num_steps_done, data_changed=self.data_changed)
            if self.num_steps_done == 0:
                self.save()  # so that even a run that goes wrong at once can be resumed
            while self.progress < 1.0 and not self.stop_requested:
                result = self.step()
                if result.skipped:
                    self._report_skip(progress, result)
                else:
                    self._report(progress, result)
                    self._periodic(progress)
            self.save()
            progress.log("stop", step=self.num_steps_done, elapsed=round(self.elapsed, 3), finished=self.progress >= 1.0)
        return self.progress >= 1.0

    def _report_skip(self, progress: Progress, result: StepResult) -> None:
        """Log a skipped step; TrainingError when it was one too many."""
        step, total = self.num_steps_done + 1, self.guard.num_skipped
        values = {"loss": result.loss, "grad_norm": result.grad_norm, "reason": result.skipped}
        progress.log("skipped", step=step, tokens=self.num_tokens_done, skipped=total, **values)
        progress.say(f"step {step}: skipped: {result.skipped}")
        if self.guard.gives_up:
            progress.log("stop", step=self.num_steps_done, elapsed=round(self.elapsed, 3), finished=False, gave_up=True)
            raise TrainingError(self._advice(step, result.skipped))

    def _advice(self, step: int, reason: str) -> str:
        skips = f"{self.guard.num_recently_skipped} of the last {self.config.guard.skip_window} steps were skipped"
        return (
            f"step {step}: {skips}, this one because its {reason}; the state saved at step {self.num_steps_saved} is left as "
            f"it was. Go on from there with smaller learning rates: lrt-train --resume {self.run_folder} --lr-scale "
            f"{self.config.optimizer.lr_scale / 2:g}; or, where the data is to blame, with a larger --max-skipped or with "
            "--skip-deviations 0"
        )

    def _report(self, progress: Progress, result: StepResult) -> None:
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

    def _periodic(self, progress: Progress) -> None:
        started = time.monotonic()
        if self.num_steps_done % self.config.eval_every == 0:
            result = self.evaluate()
            progress.log("evaluation", **result)
            progress.say(f"step {self.num_steps_done}: validation bpb {result['bpb']:.4f}")
        self.elapsed += time.monotonic() - started
        if self.num_steps_done % self.config.save_every == 0:
            self.save()


def check_is_new(run: Path) -> None:
    """StateError when a saved run lies in the folder."""
    if (run / STATE_FILE).exists():
        raise StateError(f"{run}: holds a run already; resume it or choose another folder")


def load_run_config(run: Path) -> TrainingConfig:
    """The configuration stored in a run's folder."""
    return TrainingConfig.from_dict(read_json(run / CONFIG_FILE))


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
