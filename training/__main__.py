"""`lrt-train`: start, resume and finish training runs from the command line."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import get_args

import torch

from lrt_core.checkpoint import load_config, load_tokenizer
from lrt_core.config import RecurrenceConfig
from lrt_core.tokenizer import Tokenizer
from training.command import device_of
from training.config import PRESETS, PYTHON_SOURCES, Precision, TrainingConfig
from training.data import Corpus, load_corpus
from training.finish import finish
from training.guards import GuardConfig, add_guard_flags
from training.initial import check_fits, initialize
from training.schedules.flags import add_schedule_flags, given_options, option_names
from training.schedules.registry import entry
from training.sinks import Sink, TensorBoard, Wandb, require
from training.state import CHECKPOINT_FOLDER, COMMAND_FILE
from training.tokenizer import train_tokenizer
from training.trainer import Trainer, check_is_new, load_run_config, uses_bfloat16

EXIT_INTERRUPTED = 130
DEFAULT_PRESET = "small"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 error, 2 usage, 130 interrupted with the state saved."""
    argv = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(argv)
    try:
        return _train(options)
    except (ValueError, OSError) as error:
        print(f"lrt-train: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lrt-train: interrupted outside of training; nothing that was saved is lost", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lrt-train",
        description="Train a Latent Recurrent Transformer. Ctrl-C stops a run so that it can be resumed.",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help=f"model and settings (default: {DEFAULT_PRESET})")
    parser.add_argument("--run", type=Path, help="folder of a new run (default: runs/PRESET)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run, with the settings stored in it")
    parser.add_argument("--finish", action="store_true", help="with --resume: write the checkpoint as of the last saved state")
    parser.add_argument("--out", type=Path, help="where the checkpoint goes (default: RUN/checkpoint)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--tensorboard", action="store_true", help="figures for TensorBoard in RUN/tensorboard")
    parser.add_argument("--wandb", metavar="PROJECT", help="figures for this project of Weights & Biases")
    either = parser.add_argument_group("settings of a new run, or changed from here on with --resume")
    either.add_argument("--lr-scale", type=float, metavar="X", help="factor on all learning rates (default: 1)")
    add_guard_flags(either)
    settings = parser.add_argument_group("settings of a new run, instead of the preset's")
    settings.add_argument("--data", action="append", metavar="SOURCE", help=f"{PYTHON_SOURCES}, a file or a folder; repeatable")
    settings.add_argument("--init-from", type=Path, metavar="CHECKPOINT", help="start with its weights, plain or recurrent")
    add_schedule_flags(settings)
    settings.add_argument("--steps", type=int, dest="num_steps", help="optimizer steps")
    settings.add_argument("--time-budget", type=float, metavar="SECONDS", help="end the run after this time at the latest")
    settings.add_argument("--batch-size", type=int, help="rows per step")
    settings.add_argument("--seed", type=int)
    settings.add_argument("--precision", choices=get_args(Precision))
    settings.add_argument("--compile", action="store_true", default=None, help="torch.compile of the layers")
    settings.add_argument(
        "--recompute", action="store_true", default=None, help="less memory for more time: activation checkpointing"
    )
    return parser


_OWN_SETTINGS = ("data", "schedule", "num_steps", "time_budget", "batch_size", "seed", "precision", "compile", "recompute")
_FIXED_SETTINGS = (*_OWN_SETTINGS[:2], *option_names(), *_OWN_SETTINGS[2:])
"""Those that hold for a whole run; those of the schedules' options follow the schedule's own."""
_GUARD_SETTINGS = tuple(one.name for one in fields(GuardConfig))
_CHANGING_SETTINGS = ("lr_scale", *_GUARD_SETTINGS)
"""Those that may also be changed when a run is resumed."""


def _train(options: argparse.Namespace) -> int:
    _check_packages(options)
    trainer = _resumed(options) if options.resume is not None else _created(options)
    run = trainer.run_folder
    print(_summary(trainer), file=sys.stderr)
    if not options.finish:
        with _stopping_on_signals(trainer):
            finished = trainer.run(_sinks(trainer, options))
        if not finished:
            print(f"stopped at step {trainer.num_steps_done}; go on with: lrt-train --resume {run}", file=sys.stderr)
            return EXIT_INTERRUPTED
    out = options.out or run / CHECKPOINT_FOLDER
    print(f"measuring sequential bits per byte, then writing {out}", file=sys.stderr)
    results = finish(trainer, out)
    print(f"{out}: sequential bpb {results.sequential:.4f}, parallel bpb {results.parallel.merged:.4f}")
    return 0


def _check_packages(options: argparse.Namespace) -> None:
    """ValueError where a package that a flag needs is missing: before anything takes time."""
    if options.tensorboard:
        require("--tensorboard", "tensorboard")
    if options.wandb is not None:
        require("--wandb", "wandb")


def _sinks(trainer: Trainer, options: argparse.Namespace) -> list[Sink]:
    sinks: list[Sink] = []
    if options.tensorboard:
        sinks.append(TensorBoard(trainer.run_folder))
    if options.wandb is not None:
        sinks.append(Wandb(trainer.run_folder, options.wandb, trainer.config.to_dict()))
    return sinks


def _summary(trainer: Trainer) -> str:
    size = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    precision = "bfloat16" if uses_bfloat16(trainer.config.precision, trainer.device) else "float32"
    return (
        f"{trainer.run_folder}: {size:.1f}M parameters, schedule {trainer.config.schedule}, {precision} on {trainer.device}; "
        f"{len(trainer.corpus.train):,} pieces to train on, {len(trainer.corpus.validation):,} documents to validate on"
    )


def _created(options: argparse.Namespace) -> Trainer:
    if options.finish:
        raise ValueError("--finish needs --resume RUN")
    preset = options.preset or DEFAULT_PRESET
    config = _configured(PRESETS[preset], options)
    run = options.run or Path("runs") / preset
    check_is_new(run)
    corpus = _load(config)
    tokenizer = _tokenizer(config, corpus) if options.init_from is None else load_tokenizer(options.init_from)
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    trainer = Trainer.create(config, run, corpus, tokenizer, _command(options), device_of(options.device))
    if options.init_from is not None:
        initialize(trainer.model, options.init_from)
    return trainer


def _tokenizer(config: TrainingConfig, corpus: Corpus) -> Tokenizer:
    order = torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(config.seed)).tolist()
    texts = (corpus.train[index].text for index in order)
    return train_tokenizer(texts, config.model.vocab_size, config.tokenizer_bytes)


def _command(options: argparse.Namespace) -> str:
    """The command that starts the same training anywhere: preset and settings, without this machine's folders and device."""
    words = ["lrt-train"]
    if options.preset is not None or options.init_from is None:
        words += ["--preset", options.preset or DEFAULT_PRESET]
    if options.init_from is not None:
        words += ["--init-from", options.init_from.name]
    return shlex.join([*words, *_given_words(options, (*_FIXED_SETTINGS, *_CHANGING_SETTINGS))])


def _given_words(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The flags among `names` that were given, as words of a command line."""
    words: list[str] = []
    for name in names:
        value = getattr(options, name)
        flag = "--steps" if name == "num_steps" else f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            for one in values:
                words += [flag, _word(one)]
    return words


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _configured(config: TrainingConfig, options: argparse.Namespace) -> TrainingConfig:
    """The preset with the given settings in place of its own; the recurrence follows the schedule.

    With --init-from the architecture is the checkpoint's, unless a preset is asked for: then the two must fit.
    """
    given = {name: getattr(options, name) for name in _OWN_SETTINGS if getattr(options, name) is not None}
    if "data" in given:
        given["data"] = tuple(given["data"])
    schedule = given.get("schedule", config.schedule)
    of_schedule = given_options(options, schedule)
    if schedule == config.schedule:
        of_schedule = {**config.schedule_options, **of_schedule}
    model = config.model
    if options.init_from is not None:
        source = load_config(options.init_from)
        model = source if options.preset is None else replace(model, vocab_size=source.vocab_size)
    if not entry(schedule).is_recurrent:
        model = replace(model, recurrence=None)
    elif model.recurrence is None:
        model = replace(model, recurrence=RecurrenceConfig(source_layer=model.num_layers - 1))
    if options.init_from is not None:
        check_fits(options.init_from, source, model)
    return _changed(replace(config, model=model, schedule_options=of_schedule, **given), options)


def _changed(config: TrainingConfig, options: argparse.Namespace) -> TrainingConfig:
    """The configuration with the learning rates' factor and the guard's settings that were given."""
    guard = {name: getattr(options, name) for name in _GUARD_SETTINGS if getattr(options, name) is not None}
    rate = config.optimizer.lr_scale if options.lr_scale is None else options.lr_scale
    return replace(config, optimizer=replace(config.optimizer, lr_scale=rate), guard=replace(config.guard, **guard))


def _resumed(options: argparse.Namespace) -> Trainer:
    given = [name for name in ("init_from", *_FIXED_SETTINGS) if getattr(options, name) is not None]
    if given:
        raise ValueError(f"--resume goes on with the run's own settings; --{given[0].replace('_', '-')} cannot be given")
    config = _changed(load_run_config(options.resume), options)
    trainer = Trainer.resume(options.resume, _load(config), device_of(options.device), config)
    if changes := shlex.join(_given_words(options, _CHANGING_SETTINGS)):
        # For the model card, which shows the file as one block.
        with (options.resume / COMMAND_FILE).open("a", encoding="utf-8") as commands:
            commands.write(f"    lrt-train --resume RUN {changes}    # after step {trainer.num_steps_done}\n")
    if trainer.data_changed:
        print("lrt-train: warning: the data changed since this run was saved; it will not go on exactly", file=sys.stderr)
    return trainer


def _load(config: TrainingConfig) -> Corpus:
    corpus = load_corpus(config.data, config.validation_fraction, config.piece_characters)
    if corpus.skipped:
        print(f"lrt-train: skipped {len(corpus.skipped)} corrupt record(s), the first: {corpus.skipped[0]}", file=sys.stderr)
    return corpus


@contextmanager
def _stopping_on_signals(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step in hand; a second one ends the program at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.stop_requested = True
        signal.signal(number, before[number])

    before = {int(number): signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
