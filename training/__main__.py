"""`lrt-train`: start, resume and finish training runs from the command line."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import torch

from lrt_core.checkpoint import load_config, load_tokenizer
from lrt_core.tokenizer import Tokenizer
from training.config import PRESETS, PYTHON_LIBRARY, PYTHON_SOURCES, Precision, TrainingConfig
from training.data import ShardedCorpus
from training.data.documents import TEXT_SUFFIXES
from training.data.opening import learn_tokenizer, open_corpus
from training.data.records import RECORD_SUFFIXES
from training.distributed import RankError, Ranks, is_launched, is_loss_of_rank, joined, local_device
from training.finish import finish
from training.initial import check_fits
from training.recurrence_flags import RECURRENCE_SETTINGS, add_recurrence_flags, with_recurrence
from training.schedules.flags import add_schedule_flags, given_options, option_names
from training.schedules.registry import entry
from training.state import CHECKPOINT_FOLDER, Which
from training.study.__main__ import main as study
from training.trainer import (
    Trainer,
    check_is_new,
    load_run_config,
    load_run_tokenizer,
    uses_bfloat16,
    write_settings,
)

EXIT_INTERRUPTED = 130
DEFAULT_PRESET = "small"
CHAT_LR_SCALE = 0.1
"""Of a fresh model's learning rates, for one that has learned already."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 error, 2 usage, 130 interrupted with the state saved."""
    argv = sys.argv[1:] if arguments is None else arguments
    if argv[:1] == ["study"]:
        return study(argv[1:])
    options = _parser().parse_args(argv)
    who = f"lrt-train: rank {os.environ['RANK']}:" if is_launched() else "lrt-train:"
    try:
        return _train(options)
    except RankError:
        return 1  # that rank says what happened
    except RuntimeError as error:
        if not is_loss_of_rank(error):
            raise
        print(f"{who} error: another rank is gone: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"{who} error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{who} interrupted outside of training; nothing that was saved is lost", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lrt-train",
        description="Train a Latent Recurrent Transformer. Ctrl-C stops a run so that it can be resumed.",
        epilog="Several processes: torchrun --nproc-per-node N -m training [the same arguments, but --run-folder for --run]. "
        "They share every batch, so it must be a multiple of N rows; the run may be resumed with any other number, and with or "
        "without --fsdp.",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help=f"model and settings (default: {DEFAULT_PRESET})")
    # torchrun takes --run for one of its own, wherever it stands.
    parser.add_argument("--run", "--run-folder", type=Path, help="folder of a new run (default: runs/PRESET)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run, with the settings stored in it")
    parser.add_argument("--finish", action="store_true", help="with --resume: write the checkpoint as of a saved state")
    parser.add_argument(
        "--from",
        choices=get_args(Which),
        dest="which",
        help="with --finish: which state, best by validation BPB (default: last)",
    )
    parser.add_argument("--out", type=Path, help="where the checkpoint goes (default: RUN/checkpoint)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--fsdp", action="store_true", help="with torchrun: each process holds a part of the model")
    parser.add_argument(
        "--accumulate", type=int, metavar="N", help="compute a step's rows in N parts: less memory, same losses"
    )
    settings = parser.add_argument_group("settings of a new run, instead of the preset's")
    _add_data_flags(settings)
    settings.add_argument("--init-from", type=Path, metavar="CHECKPOINT", help="start with its weights, plain or recurrent")
    add_schedule_flags(settings)
    add_recurrence_flags(settings)
    settings.add_argument("--steps", type=int, dest="num_steps", help="optimizer steps")
    settings.add_argument("--time-budget", type=float, metavar="SECONDS", help="end the run after this time at the latest")
    settings.add_argument("--batch-size", type=int, help="rows per step")
    settings.add_argument("--seed", type=int)
    settings.add_argument("--save-every", type=int, metavar="N", help="save the run's state every N steps")
    settings.add_argument("--keep-last", type=int, metavar="N", help="saved states to keep (default: 2)")
    settings.add_argument("--keep-best", action="store_true", default=None, help="and the one with the best validation BPB")
    settings.add_argument("--eval-every", type=int, metavar="N", help="measure validation BPB every N steps")
    settings.add_argument("--log-every", type=int, metavar="N", help="write every N-th step to log.jsonl")
    settings.add_argument("--precision", choices=get_args(Precision))
    settings.add_argument("--compile", action="store_true", default=None, help="torch.compile of the layers")
    settings.add_argument(
        "--recompute", action="store_true", default=None, help="less memory for more time: activation checkpointing"
    )
    return parser


def _add_data_flags(settings: argparse._ArgumentGroup) -> None:
    add, kinds = settings.add_argument, ", ".join(TEXT_SUFFIXES + RECORD_SUFFIXES)
    add(
        "--data",
        action="append",
        metavar="SOURCE",
        help=f"{PYTHON_SOURCES}, {PYTHON_LIBRARY}, a file or a folder of {kinds}; repeatable. "
        "Records have their text in `text`, conversations in `messages`",
    )
    add(
        "--chat",
        action="store_true",
        default=None,
        help="with --init-from: the data are conversations, of which only what the assistant says is learned",
    )
    add("--shards", metavar="DIR", help="where tokenised data lie, to share them among runs (default: RUN/shards)")


_OWN_SETTINGS = (
    "data",
    "chat",
    "schedule",
    "num_steps",
    "time_budget",
    "batch_size",
    "seed",
    "precision",
    "compile",
    "recompute",
)
_KEEPING = ("save_every", "keep_last", "keep_best", "eval_every", "log_every")
"""Settings that change nothing in what is trained."""
_SETTINGS = (*_OWN_SETTINGS[:3], *option_names(), *RECURRENCE_SETTINGS, *_OWN_SETTINGS[3:])
"""Every flag that fixes a run; those of the schedules' options follow the schedule's own."""


def _train(options: argparse.Namespace) -> int:
    device = local_device(_device(options.device))
    _check_together(options)
    with joined(device) as ranks:
        trainer = (_resumed if options.resume is not None else _created)(options, device, ranks)
        if ranks.is_first:
            print(_summary(trainer), file=sys.stderr)
        finished = options.finish or _run(trainer)
    if not finished:
        return EXIT_INTERRUPTED
    if not ranks.is_first:
        return 0
    if options.fsdp:  # a checkpoint is made of the whole model, which no rank had
        trainer = Trainer.resume(trainer.run_folder, trainer.corpus, device)
    return _finish(trainer, options.out or trainer.run_folder / CHECKPOINT_FOLDER)


def _check_together(options: argparse.Namespace) -> None:
    """ValueError for arguments that do not go together."""
    if options.finish and options.resume is None:
        raise ValueError("--finish needs --resume RUN")
    if options.finish and is_launched():
        raise ValueError("--finish is the work of one process: call it without torchrun")
    if options.which is not None and not options.finish:
        raise ValueError(f"--from {options.which} needs --finish")
    if options.fsdp and not is_launched():
        raise ValueError("--fsdp needs several processes: torchrun --nproc-per-node N -m training --fsdp ...")


def _run(trainer: Trainer) -> bool:
    with _stopping_on_signals(trainer):
        finished = trainer.run()
    if not finished and trainer.ranks.is_first:
        command = f"go on with: lrt-train --resume {trainer.run_folder}"
        print(f"stopped at step {trainer.num_steps_done}; {command}", file=sys.stderr)
    return finished


def _finish(trainer: Trainer, out: Path) -> int:
    print(f"measuring sequential bits per byte, then writing {out}", file=sys.stderr)
    results = finish(trainer, out)
    print(f"{out}: sequential bpb {results.sequential:.4f}, parallel bpb {results.parallel.merged:.4f}")
    return 0


def _summary(trainer: Trainer) -> str:
    size = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    precision = "bfloat16" if uses_bfloat16(trainer.config.precision, trainer.device) else "float32"
    return (
        f"{trainer.run_folder}: {size:.1f}M parameters, schedule {trainer.config.schedule}, {precision} on {trainer.device}; "
        f"{len(trainer.corpus.train):,} {'conversations' if trainer.config.chat else 'pieces'} to train on, "
        f"{len(trainer.corpus.validation):,} {'conversations' if trainer.config.chat else 'documents'} to validate on"
    )


def _created(options: argparse.Namespace, device: torch.device, ranks: Ranks) -> Trainer:
    run = options.run or Path("runs") / (options.preset or DEFAULT_PRESET)
    corpus = ranks.on_first(lambda: _begin(options, run))
    config = load_run_config(run)
    tokenizer = load_run_tokenizer(run)
    return Trainer(
        config,
        run,
        corpus or _load(config, run, tokenizer, quiet=True),
        tokenizer,
        device,
        ranks=ranks,
        sharded=options.fsdp,
        init_from=options.init_from,
    )


def _begin(options: argparse.Namespace, run: Path) -> ShardedCorpus:
    """Read the corpus and lay down a new run's settings and tokenizer in its folder."""
    config = _configured(PRESETS[options.preset or DEFAULT_PRESET], options)
    check_is_new(run)
    tokenizer = learn_tokenizer(config) if options.init_from is None else load_tokenizer(options.init_from)
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    corpus = _load(config, run, tokenizer)
    write_settings(config, run, tokenizer, _command(options))
    return corpus


def _command(options: argparse.Namespace) -> str:
    """The command that starts the same training anywhere: preset and settings, without this machine's folders and device."""
    words = ["lrt-train"]
    if options.preset is not None or options.init_from is None:
        words += ["--preset", options.preset or DEFAULT_PRESET]
    if options.init_from is not None:
        words += ["--init-from", options.init_from.name]
    for name in _SETTINGS:
        value = getattr(options, name)
        flag = "--steps" if name == "num_steps" else f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            for one in values:
                words += [flag, _word(one)]
    return shlex.join(words)


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _configured(config: TrainingConfig, options: argparse.Namespace) -> TrainingConfig:
    """The preset with the given settings in place of its own; the recurrence follows the schedule.

    With --init-from the architecture is the checkpoint's, unless a preset is asked for: then the two must fit.
    """
    names = (*_OWN_SETTINGS, *_KEEPING, "accumulate")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "data" in given:
        given["data"] = tuple(given["data"])
    source = None if options.init_from is None else load_config(options.init_from)
    if source is not None and source.recurrence is None and options.preset is None:
        given.setdefault("schedule", "baseline")
    schedule = given.get("schedule", config.schedule)
    of_schedule = given_options(options, schedule)
    if schedule == config.schedule:
        of_schedule = {**config.schedule_options, **of_schedule}
    model = config.model
    if source is not None:
        model = source if options.preset is None else replace(model, vocab_size=source.vocab_size)
    model = with_recurrence(model, options, schedule, entry(schedule).is_recurrent)
    if source is not None:
        check_fits(options.init_from, source, model)
    return replace(config, model=model, schedule_options=of_schedule, **_of_data(config, options), **given)


def _of_data(config: TrainingConfig, options: argparse.Namespace) -> dict[str, Any]:
    """What follows from the kind of data: conversations are not cut, and change a trained model gently."""
    if options.chat and (options.init_from is None or options.data is None):
        raise ValueError("--chat goes on from a checkpoint with conversations: it needs --init-from and --data")
    of_chat = {"optimizer": config.optimizer.scaled(CHAT_LR_SCALE), "prompt_cuts": 0.0}
    return {"shards": options.shards, **(of_chat if options.chat else {})}


def _resumed(options: argparse.Namespace, device: torch.device, ranks: Ranks) -> Trainer:
    given = [name for name in ("init_from", "shards", *_SETTINGS, *_KEEPING) if getattr(options, name) is not None]
    if given:
        raise ValueError(f"--resume goes on with the run's own settings; --{given[0].replace('_', '-')} cannot be given")
    config, tokenizer = load_run_config(options.resume), load_run_tokenizer(options.resume)
    corpus = ranks.on_first(lambda: _load(config, options.resume, tokenizer))
    which: Which = options.which or "last"
    trainer = Trainer.resume(
        options.resume,
        corpus or _load(config, options.resume, tokenizer, quiet=True),
        device,
        ranks=ranks,
        sharded=options.fsdp,
        which=which,
        accumulate=options.accumulate,
    )
    if not ranks.is_first:
        return trainer
    for damage in trainer.damaged_states:
        print(f"lrt-train: warning: passed over a damaged state: {damage}", file=sys.stderr)
    if trainer.damaged_states:
        print(f"lrt-train: warning: going on from step {trainer.num_steps_done}", file=sys.stderr)
    if trainer.data_changed:
        print("lrt-train: warning: the data changed since this run was saved; it will not go on exactly", file=sys.stderr)
    return trainer


def _load(config: TrainingConfig, run: Path, tokenizer: Tokenizer, quiet: bool = False) -> ShardedCorpus:
    """The corpus in shards; the first rank makes them where they lack, the others find them made and are quiet."""
    corpus = open_corpus(config, run, tokenizer)
    for remark in () if quiet else corpus.remarks():
        print(f"lrt-train: {remark}", file=sys.stderr)
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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such kind of device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device can be used here")
    return device


if __name__ == "__main__":
    sys.exit(main())
