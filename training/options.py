"""The command line of `lrt-train`: its flags, and what they make of a preset. Neighbour: `__main__.py` runs it."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from lrt_core.checkpoint import load_config
from training.config import PRESETS, PYTHON_LIBRARY, PYTHON_SOURCES, Precision, TrainingConfig
from training.data.documents import TEXT_SUFFIXES
from training.data.records import RECORD_SUFFIXES
from training.distributed import is_launched
from training.guards import GuardConfig, add_guard_flags
from training.initial import check_fits
from training.recurrence_flags import RECURRENCE_SETTINGS, add_recurrence_flags, with_recurrence
from training.schedules.flags import add_schedule_flags, given_options, option_names
from training.schedules.registry import entry
from training.state import Which

DEFAULT_PRESET = "small"
CHAT_LR_SCALE = 0.1
"""Of a fresh model's learning rates, for one that has learned already."""


def make_parser() -> argparse.ArgumentParser:
    """All of the command's flags; a setting that is not given is None."""
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
    parser.add_argument("--device", help="(default: cuda where there is one, but cpu with --finish)")
    parser.add_argument("--fsdp", action="store_true", help="with torchrun: each process holds a part of the model")
    parser.add_argument(
        "--accumulate", type=int, metavar="N", help="compute a step's rows in N parts: less memory, same losses"
    )
    parser.add_argument("--tensorboard", action="store_true", help="figures for TensorBoard in RUN/tensorboard")
    parser.add_argument("--wandb", metavar="PROJECT", help="figures for this project of Weights & Biases")
    either = parser.add_argument_group("settings of a new run, or changed from here on with --resume")
    either.add_argument("--lr-scale", type=float, metavar="X", help="factor on all learning rates (default: 1)")
    either.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="on CUDA, launch a step's kernels at once, for more memory (default: yes)",
    )
    add_guard_flags(either)
    _add_settings(parser.add_argument_group("settings of a new run, instead of the preset's"))
    return parser


def _add_settings(settings: argparse._ArgumentGroup) -> None:
    _add_data_flags(settings)
    settings.add_argument("--init-from", type=Path, metavar="CHECKPOINT", help="start with its weights, plain or recurrent")
    add_schedule_flags(settings)
    add_recurrence_flags(settings)
    settings.add_argument("--steps", type=int, dest="num_steps", help="optimizer steps")
    settings.add_argument("--time-budget", type=float, metavar="SECONDS", help="end the run after this time at the latest")
    settings.add_argument("--batch-size", type=int, help="rows per step")
    settings.add_argument("--warmup", type=float, metavar="X", help="part of the run in which learning rates rise, 0..1")
    settings.add_argument("--warmdown", type=float, metavar="X", help="part at its end in which they fall to zero, 0..1")
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
    "chat",
    "schedule",
    "num_steps",
    "time_budget",
    "batch_size",
    "warmup",
    "warmdown",
    "seed",
    "precision",
    "compile",
    "recompute",
)
_KEEPING = ("save_every", "keep_last", "keep_best", "eval_every", "log_every")
"""Settings that change nothing in what is trained."""
_FIXED_SETTINGS = (*_OWN_SETTINGS[:2], *option_names(), *RECURRENCE_SETTINGS, *_OWN_SETTINGS[2:])
"""Those that hold for a whole run; those of the schedules' options follow the schedule's own."""
_GUARD_SETTINGS = tuple(one.name for one in fields(GuardConfig))
_CHANGING_SETTINGS = ("lr_scale", *_GUARD_SETTINGS)
"""Those that may also be changed when a run is resumed."""


def check_together(options: argparse.Namespace) -> None:
    """ValueError for arguments that do not go together."""
    if options.finish and options.resume is None:
        raise ValueError("--finish needs --resume RUN")
    if options.finish and is_launched():
        raise ValueError("--finish is the work of one process: call it without torchrun")
    if options.which is not None and not options.finish:
        raise ValueError(f"--from {options.which} needs --finish")
    if options.fsdp and not is_launched():
        raise ValueError("--fsdp needs several processes: torchrun --nproc-per-node N -m training --fsdp ...")
    given = [
        name for name in ("init_from", "data", "shards", *_FIXED_SETTINGS, *_KEEPING) if getattr(options, name) is not None
    ]
    if options.resume is not None and given:
        raise ValueError(f"--resume goes on with the run's own settings; {_flag(given[0])} cannot be given")


def command_of(options: argparse.Namespace) -> str:
    """The command that starts the same training anywhere: preset and settings, without this machine's folders and device."""
    words = ["lrt-train"]
    if options.preset is not None or options.init_from is None:
        words += ["--preset", options.preset or DEFAULT_PRESET]
    if options.init_from is not None:
        words += ["--init-from", options.init_from.name]
    for source in options.data or ():
        words += ["--data", Path(_absolute(source)).name]
    return shlex.join([*words, *_given_words(options, (*_FIXED_SETTINGS, *_CHANGING_SETTINGS))])


def changes_of(options: argparse.Namespace) -> str:
    """What a resumed run is told to change, as part of a command line."""
    return shlex.join(_given_words(options, _CHANGING_SETTINGS))


def _given_words(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The flags among `names` that were given, as words of a command line."""
    words: list[str] = []
    for name in names:
        value = getattr(options, name)
        flag = _flag(name)
        if value is True:
            words.append(flag)
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            for one in values:
                words += [flag, _word(one)]
    return words


def _flag(name: str) -> str:
    return "--steps" if name == "num_steps" else f"--{name.replace('_', '-')}"


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def configured(config: TrainingConfig, options: argparse.Namespace) -> TrainingConfig:
    """The preset with the given settings in place of its own; the recurrence follows the schedule.

    With --init-from the architecture is the checkpoint's, unless a preset is asked for: then the two must fit.
    """
    names = ("data", *_OWN_SETTINGS, *_KEEPING, "accumulate")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "data" in given:
        given["data"] = tuple(map(_absolute, given["data"]))
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
    return changed(replace(config, model=model, schedule_options=of_schedule, **_of_data(config, options), **given), options)


def _absolute(source: str) -> str:
    """A source or folder for the run's settings, which hold wherever the run goes on from."""
    return source if source in (PYTHON_SOURCES, PYTHON_LIBRARY) else os.path.abspath(source)


def changed(config: TrainingConfig, options: argparse.Namespace) -> TrainingConfig:
    """The configuration with the learning rates' factor, the guard's settings and the graphs' switch that were given."""
    guard = {name: getattr(options, name) for name in _GUARD_SETTINGS if getattr(options, name) is not None}
    rate = config.optimizer.lr_scale if options.lr_scale is None else options.lr_scale
    graphs = config.cuda_graphs if options.cuda_graphs is None else options.cuda_graphs
    optimizer = replace(config.optimizer, lr_scale=rate)
    return replace(config, cuda_graphs=graphs, optimizer=optimizer, guard=replace(config.guard, **guard))


def _of_data(config: TrainingConfig, options: argparse.Namespace) -> dict[str, Any]:
    """What follows from the kind of data: conversations are not cut, and change a trained model gently."""
    if options.chat and (options.init_from is None or options.data is None):
        raise ValueError("--chat goes on from a checkpoint with conversations: it needs --init-from and --data")
    of_chat = {"optimizer": config.optimizer.scaled(CHAT_LR_SCALE), "prompt_cuts": 0.0}
    shards = None if options.shards is None else _absolute(options.shards)
    return {"shards": shards, **(of_chat if options.chat else {})}
