"""`lrt-train`: start, resume and finish training runs from the command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch

from lrt_core.checkpoint import load_tokenizer
from lrt_core.hardware import limit_threads
from lrt_core.tokenizer import Tokenizer
from training.command import device_of
from training.config import PRESETS, TrainingConfig
from training.data import ShardedCorpus
from training.data.opening import learn_tokenizer, open_corpus
from training.distributed import RankError, Ranks, is_launched, is_loss_of_rank, joined, local_device
from training.finish import finish
from training.options import DEFAULT_PRESET, changed, changes_of, check_together, command_of, configured, make_parser
from training.processes import exclusively
from training.run_folder import check_is_new, load_run_config, load_run_tokenizer, write_settings
from training.sinks import Sink, TensorBoard, Wandb, require
from training.state import CHECKPOINT_FOLDER, COMMAND_FILE, Which
from training.study.__main__ import main as study
from training.trainer import Trainer, uses_bfloat16

EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 error, 2 usage, 130 interrupted with the state saved."""
    argv = sys.argv[1:] if arguments is None else arguments
    if argv[:1] == ["study"]:
        return study(argv[1:])
    options = make_parser().parse_args(argv)
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


def _train(options: argparse.Namespace) -> int:
    limit_threads()
    device = local_device(device_of(_device_name(options)))
    check_together(options)
    _check_packages(options)
    with ExitStack() as held:  # until the checkpoint is written
        with joined(device) as ranks:
            ranks.on_first(lambda: held.enter_context(exclusively(_folder(options))))
            trainer = (_resumed if options.resume is not None else _created)(options, device, ranks)
            if ranks.is_first:
                print(_summary(trainer), file=sys.stderr)
            finished = options.finish or _run(trainer, options)
        if not finished:
            return EXIT_INTERRUPTED
        if not ranks.is_first:
            return 0
        if options.fsdp:  # a checkpoint is made of the whole model, which no rank had
            trainer = Trainer.resume(trainer.run_folder, trainer.corpus, torch.device("cpu"), to_finish=True)
        return _finish(trainer, options.out or trainer.run_folder / CHECKPOINT_FOLDER)


def _device_name(options: argparse.Namespace) -> str:
    """Where to train; a checkpoint is written on the CPU: what was trained in parts need not fit on one device."""
    if options.device is not None:
        return str(options.device)
    return "cuda" if torch.cuda.is_available() and not options.finish else "cpu"


def _folder(options: argparse.Namespace) -> Path:
    """The run's; CheckpointError where one to go on with is none."""
    if options.resume is None:
        return Path(options.run or Path("runs") / (options.preset or DEFAULT_PRESET))
    load_run_config(options.resume)
    return Path(options.resume)


def _check_packages(options: argparse.Namespace) -> None:
    """ValueError where a package that a flag needs is missing: before anything takes time."""
    if options.tensorboard:
        require("--tensorboard", "tensorboard")
    if options.wandb is not None:
        require("--wandb", "wandb")


def _sinks(trainer: Trainer, options: argparse.Namespace) -> list[Sink]:
    """What takes the run's figures beside its log, on the first rank."""
    sinks: list[Sink] = []
    if options.tensorboard and trainer.ranks.is_first:
        sinks.append(TensorBoard(trainer.run_folder))
    if options.wandb is not None and trainer.ranks.is_first:
        sinks.append(Wandb(trainer.run_folder, options.wandb, trainer.config.to_dict()))
    return sinks


def _run(trainer: Trainer, options: argparse.Namespace) -> bool:
    with _stopping_on_signals(trainer):
        finished = trainer.run(_sinks(trainer, options))
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
    run = _folder(options)
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
    config = configured(PRESETS[options.preset or DEFAULT_PRESET], options)
    check_is_new(run)
    tokenizer = learn_tokenizer(config) if options.init_from is None else load_tokenizer(options.init_from)
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    corpus = _load(config, run, tokenizer)
    write_settings(config, run, tokenizer, command_of(options))
    return corpus


def _resumed(options: argparse.Namespace, device: torch.device, ranks: Ranks) -> Trainer:
    config, tokenizer = changed(load_run_config(options.resume), options), load_run_tokenizer(options.resume)
    corpus = ranks.on_first(lambda: _load(config, options.resume, tokenizer, goes_on=True))
    which: Which = options.which or "last"
    trainer = Trainer.resume(
        options.resume,
        corpus or _load(config, options.resume, tokenizer, goes_on=True, quiet=True),
        device,
        ranks=ranks,
        sharded=options.fsdp,
        which=which,
        accumulate=options.accumulate,
        config=config,
        to_finish=options.finish,
    )
    if not ranks.is_first:
        return trainer
    if changes := changes_of(options):
        # For the model card, which shows the file as one block.
        with (options.resume / COMMAND_FILE).open("a", encoding="utf-8") as commands:
            commands.write(f"    lrt-train --resume RUN {changes}    # after step {trainer.num_steps_done}\n")
    for damage in trainer.damaged_states:
        print(f"lrt-train: warning: passed over a damaged state: {damage}", file=sys.stderr)
    if trainer.damaged_states:
        print(f"lrt-train: warning: going on from step {trainer.num_steps_done}", file=sys.stderr)
    if trainer.data_changed:
        print("lrt-train: warning: the data changed since this run was saved; it will not go on exactly", file=sys.stderr)
    return trainer


def _load(
    config: TrainingConfig, run: Path, tokenizer: Tokenizer, *, goes_on: bool = False, quiet: bool = False
) -> ShardedCorpus:
    """The corpus in shards; the first rank makes them where they lack, the others find them made and are quiet."""
    corpus = open_corpus(config, run, tokenizer, goes_on)
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


if __name__ == "__main__":
    sys.exit(main())
