"""`lrt-eval CHECKPOINT`: how well a model predicts text, in parallel and as served, and what its recurrence does.

Sequential figures are those of the true recurrence, read in parallel passes to a tolerance and checked against decoding
token by token on some rows. Neighbours: `measures.py`, `probes.py`, `evaluate.py` measure; `evaluation_plots.py` draws.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt_core.checkpoint import load_model, load_tokenizer
from lrt_core.hardware import limit_threads
from lrt_core.model import LatentRecurrentTransformer
from lrt_core.tokenizer import Tokenizer
from training import evaluation_plots
from training.command import device_of, positive, status_of
from training.config import PYTHON_SOURCES, TrainingConfig
from training.data import load_corpus, read_texts
from training.evaluate import bits_per_byte, parallel_bpb, sequential_bpb, sequential_losses
from training.measures import contraction, late_minus_early, layer_diagnostics, pack_rows, position_buckets, refined_losses
from training.probes import TASKS, ordinary_ids, score
from training.schedules.flags import add_schedule_flags, given_options
from training.schedules.registry import bind, check_model

DIAGNOSED_ROWS = 4
"""Rows on which gates are looked at."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 for what cannot be evaluated, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    return status_of("lrt-eval", lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lrt-eval", description="Bits per byte in parallel and as served, contraction, in-context measures, gates."
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint directory")
    add(
        "--data",
        action="append",
        metavar="SOURCE",
        help=f"a file or folder of text, as lrt-train takes; repeatable (default: {PYTHON_SOURCES}, the part for validation)",
    )
    add("--held-out", action="store_true", help="of --data only what lrt-train holds out of the same sources for validation")
    add("--rows", type=positive, default=32, metavar="N", help="of text, spread over the data (default %(default)s)")
    add("--sequence-len", type=positive, metavar="N", help="tokens of a row (default: the trained context)")
    add(
        "--tolerance", type=float, default=1e-6, metavar="X", help="relative change at which a memory is settled (default 1e-6)"
    )
    add("--max-passes", type=positive, default=64, metavar="N", help="beyond them, token by token (default %(default)s)")
    add("--check-rows", type=int, default=1, metavar="N", help="rows also decoded token by token (default %(default)s)")
    add("--task-rows", type=positive, default=32, metavar="N", help="sequences of each synthetic task (default %(default)s)")
    add("--task-len", type=positive, default=64, metavar="N", help="tokens of each of them (default %(default)s)")
    add("--seed", type=int, default=0, help="of the synthetic tasks (default %(default)s)")
    add("--device", default="cpu", help="where to compute (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured there too")
    add("--plots", type=Path, metavar="DIR", help="draw positions.png, passes.png and gates.png there (needs matplotlib)")
    add_schedule_flags(parser.add_argument_group("schedule of the parallel figures (default: interleaved, or baseline)"))
    return parser


def _run(args: argparse.Namespace) -> None:
    limit_threads()
    if args.plots is not None:
        evaluation_plots.require()
    if not 0 < args.tolerance < 1:
        raise ValueError(f"--tolerance must lie between 0 and 1, got {args.tolerance:g}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    if args.held_out and args.data is None:
        raise ValueError("--held-out needs --data: without it only what training holds out is read")
    if args.task_len < 4:
        raise ValueError(f"--task-len must be at least 4, got {args.task_len}")
    model = load_model(args.checkpoint, dtype=torch.float32, device=device_of(args.device))
    tokenizer = load_tokenizer(args.checkpoint)
    length = args.sequence_len or model.config.sequence_len
    rows = pack_rows(_texts(args.data, args.held_out), tokenizer, length, args.rows).to(model.device)
    results = evaluate(model, tokenizer, rows, args)
    for line in table(results):
        print(line)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    if args.plots is not None:
        for path in evaluation_plots.draw(results, args.plots):
            print(path)


def _texts(sources: list[str] | None, held_out: bool) -> list[str]:
    """Of the sources, all of them or what a run on them does not train on; without sources of this machine's Python files."""
    if sources is not None and not held_out:
        return read_texts(sources)
    corpus = load_corpus(sources or (PYTHON_SOURCES,), TrainingConfig.validation_fraction, piece_characters=1 << 20)
    return [document.text for document in corpus.validation]


def evaluate(model: LatentRecurrentTransformer, tokenizer: Tokenizer, rows: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured on rows [R, T + 1], as plain data for JSON."""
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=model.device)
    targets = rows[:, 1:]
    diagnosed = rows[:DIAGNOSED_ROWS]
    return {
        "checkpoint": str(args.checkpoint),
        "data": "all" if args.data is not None and not args.held_out else "held out",
        "rows": len(rows),
        "tokens": targets.numel(),
        "bytes": int(byte_lengths[targets].sum()),
        **_parallel(model, rows, byte_lengths, args),
        **_sequential(model, rows, byte_lengths, args),
        "tasks": _tasks(model, tokenizer, args),
        "layers": layer_diagnostics(model, diagnosed, args.tolerance),
    }


def _parallel(
    model: LatentRecurrentTransformer, rows: Tensor, byte_lengths: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    name = args.schedule or ("baseline" if model.config.recurrence is None else "interleaved")
    options = given_options(args, name)
    check_model(model, name)
    bpb = parallel_bpb(model, bind(name, options), rows, byte_lengths)
    return {"schedule": name, "schedule_options": options, "parallel_bpb": bpb.passes, "merged_bpb": bpb.merged}


def _sequential(
    model: LatentRecurrentTransformer, rows: Tensor, byte_lengths: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    refined = refined_losses(model, rows, args.tolerance, args.max_passes)
    losses = refined.losses if refined.settled else sequential_losses(model, rows)
    results: dict[str, Any] = {
        "sequential_bpb": bits_per_byte(losses, rows[:, 1:], byte_lengths),
        "sequential_method": "refinement" if refined.settled else "token by token",
        "residuals": refined.residuals,
        "contraction": contraction(refined.residuals),
        "positions": [bucket._asdict() for bucket in position_buckets(losses)],
        "in_context": late_minus_early(losses),
    }
    sample = rows[: max(0, args.check_rows)]
    if len(sample) and refined.settled:
        decoded = sequential_bpb(model, sample, byte_lengths)
        own = bits_per_byte(refined.losses[: len(sample)], sample[:, 1:], byte_lengths)
        results["check"] = {"rows": len(sample), "decoded_bpb": decoded, "refined_bpb": own, "difference": own - decoded}
    return results


def _tasks(model: LatentRecurrentTransformer, tokenizer: Tokenizer, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    ids, generator = ordinary_ids(tokenizer), torch.Generator().manual_seed(args.seed)
    results = {}
    for name, make in TASKS.items():
        task = make(ids, args.task_rows, args.task_len, generator)
        result = score(model, task, tokenizer.bos_id, args.tolerance)
        results[name] = {**result._asdict(), "chance": 1 / len(ids)}
    return results


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines for a reader."""
    per_forward = ", ".join(f"{value:.4f}" for value in results["parallel_bpb"])
    lines = [
        f"{results['rows']} rows, {results['tokens']:,} tokens, {results['bytes']:,} bytes, {results['data']} of the data",
        f"sequential bpb      {results['sequential_bpb']:.4f}  (as served; by {results['sequential_method']})",
        f"parallel bpb        {results['merged_bpb']:.4f}  ({results['schedule']}; per forward {per_forward})",
    ]
    if "check" in results:
        check = results["check"]
        lines.append(
            f"token by token      {check['decoded_bpb']:.4f}  on {check['rows']} row(s); refined {check['refined_bpb']:.4f}"
        )
    if results["contraction"] is not None:
        rest, passes = results["contraction"], len(results["residuals"])
        lines.append(f"contraction         {rest:.3f}  (a pass shrinks errors {1 / rest:.2f} times; {passes} passes)")
        lines.append("residual by pass    " + "  ".join(f"{residual:.1e}" for residual in results["residuals"]))
    context = results["in_context"]
    quarters = f"first quarter {context['early']:.4f}, last {context['late']:.4f}"
    lines.append(f"late minus early    {context['late_minus_early']:+.4f} nats ({quarters})")
    lines.append("loss by position    " + "  ".join(f"{one['start']}+: {one['loss']:.3f}" for one in results["positions"]))
    for name, one in results["tasks"].items():
        lines.append(f"{name:<19} {one['accuracy']:.1%} right, {one['loss']:.3f} nats (chance {one['chance']:.2%})")
    return lines + [_layer_line(layer) for layer in results["layers"]]


def _layer_line(layer: dict[str, Any]) -> str:
    parts = [f"layer {layer['layer']:<13}"]
    for key, value in layer.items():
        if isinstance(value, dict):
            parts.append(f"{key} {value['mean']:.3f}±{value['std']:.3f}")
        elif key != "layer":
            parts.append(f"{key} {value:.3f}")
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
