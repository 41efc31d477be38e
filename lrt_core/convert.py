"""`lrt-convert`: the authors' checkpoint files to a checkpoint of this project and back. The work is done in `official.py`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lrt_core.checkpoint import CONFIG_FILE, load_config, write_checkpoint
from lrt_core.config import ModelConfig
from lrt_core.files import CheckpointError
from lrt_core.official import OfficialCheckpoint, read_official, write_official
from lrt_core.official_tokenizer import PICKLE_FILE

_MODEL_FILE = re.compile(r"model_(\d+)\.pt")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 after an error that was printed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.to_official and (options.step is not None or options.tokenizer is not None):
        parser.error("--step and --tokenizer choose among the authors' files; they have no meaning with --to-official")
    try:
        _check_target(options.out, options.force)
        run = _to_official if options.to_official else _from_official
        print(run(options))
    except (CheckpointError, OSError) as error:
        print(f"lrt-convert: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lrt-convert",
        description="Convert the authors' checkpoint files to a checkpoint that lrt-server loads, or back.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder with model_*.pt and meta_*.json, one that holds checkpoint/ and tokenizer/, or a nanochat base folder; "
        "with --to-official, a checkpoint of this project",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--step", type=int, help="training step to convert (default: the latest)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help=f"folder of {PICKLE_FILE} where it is not beside SOURCE")
    parser.add_argument("--to-official", action="store_true", help="write the authors' files from our checkpoint")
    parser.add_argument("--dtype", choices=_DTYPES, help="store the matrices in this type (default: as they are)")
    parser.add_argument("--force", action="store_true", help="replace OUT where it holds an earlier conversion")
    return parser


def _check_target(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: exists and is not a directory")
    if not force and out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out}: exists and is not empty; --force replaces an earlier conversion")


def _from_official(options: argparse.Namespace) -> str:
    folder = find_checkpoint(options.source)
    model_file, meta_file = find_step(folder, options.step)
    official = read_official(model_file, meta_file, find_tokenizer(folder, options.tokenizer))
    dtype = _DTYPES[options.dtype] if options.dtype else None
    tensors = {
        name: tensor if dtype is None or tensor.ndim < 2 else tensor.to(dtype) for name, tensor in official.tensors.items()
    }
    write_checkpoint(
        options.out,
        official.config,
        tensors,
        official.tokenizer,
        model_card=_model_card(official),
        official=official.record.to_dict(),
    )
    return f"{options.out}: {describe(official.config)}, converted from step {official.record.step} in {folder}"


def _to_official(options: argparse.Namespace) -> str:
    record = write_official(options.source, options.out, dtype=_DTYPES[options.dtype] if options.dtype else None)
    return f"{options.out}: {describe(load_config(options.source))}, as the authors' files of step {record.step}"


def describe(config: ModelConfig) -> str:
    """One line on an architecture."""
    recurrence = config.recurrence
    shape = f"{config.num_layers} layers, hidden size {config.hidden_size}, vocabulary {config.vocab_size}"
    if recurrence is None:
        return f"{shape}, no recurrence"
    return f"{shape}, {recurrence.variant} recurrence from layer {recurrence.source_layer}"


def find_checkpoint(source: Path) -> Path:
    """The one folder with model_*.pt that `source` stands for; CheckpointError lists the choices where there are several.

    Looked for in `source`, `source/checkpoint`, and the tags of nanochat's folders (base_checkpoints/TAG,
    chatsft_checkpoints/TAG and so on), from nanochat's base folder or from one of those.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: {'not a directory' if source.exists() else 'no such directory'}")
    for candidates in ([source], [source / "checkpoint"], sorted([*source.glob("*_checkpoints/*"), *source.glob("*/")])):
        found = [folder for folder in candidates if _steps(folder)]
        if len(found) == 1:
            return found[0]
        if found:
            choices = "".join(f"\n  {folder}" for folder in found)
            raise CheckpointError(f"{source}: holds several checkpoints; name one of them:{choices}")
    if (source / CONFIG_FILE).exists():
        raise CheckpointError(f"{source}: is already a checkpoint of this project (--to-official converts it back)")
    raise CheckpointError(f"{source}: no model_*.pt here, in checkpoint/ or in a nanochat base folder's *_checkpoints/*/")


def find_step(folder: Path, step: int | None) -> tuple[Path, Path]:
    """The model and meta file of a step, the latest for None."""
    steps = _steps(folder)
    number = max(steps) if step is None else step
    if number not in steps:
        raise CheckpointError(f"{folder}: has no step {number}; it has {', '.join(map(str, sorted(steps)))}")
    model_file = steps[number]
    return model_file, model_file.with_name(model_file.stem.replace("model_", "meta_") + ".json")


def find_tokenizer(folder: Path, chosen: Path | None) -> Path:
    """The folder of tokenizer.pkl: `chosen`, or tokenizer/ beside the checkpoint or up to two levels above it."""
    candidates = [chosen] if chosen else [folder, *(base / "tokenizer" for base in _with_parents(folder))]
    for candidate in candidates:
        if (candidate / PICKLE_FILE).is_file():
            return candidate
    places = ", ".join(map(str, candidates))
    raise CheckpointError(f"no {PICKLE_FILE} in {places}" + ("" if chosen else "; say where it is with --tokenizer"))


def _with_parents(folder: Path) -> list[Path]:
    absolute = folder.resolve()
    return [absolute, *absolute.parents[:2]]


def _steps(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    return {int(match[1]): path for path in folder.iterdir() if (match := _MODEL_FILE.fullmatch(path.name))}


def _model_card(official: OfficialCheckpoint) -> str:
    record = official.record
    score = record.meta.get("val_bpb")
    lines = [
        "# Latent Recurrent Transformer, converted",
        "",
        f"{describe(official.config)}.",
        "",
        f"Converted by `lrt-convert` from the files of the authors' public release, step {record.step}.",
    ]
    if isinstance(score, (int, float)):
        lines.append(f"Validation bits per byte as those files state it: {score:g}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
