"""`lrt-generate CHECKPOINT "prompt"`: one-shot generation in the terminal, text streaming as it is made."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lrt_core.checkpoint import CheckpointError, load_generation_config, load_model, load_tokenizer
from lrt_core.generate import generate
from lrt_core.hardware import limit_threads
from lrt_core.sampling_params import SamplingParams
from lrt_core.text import TextDecoder

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrt-generate", description="Continue a prompt with a checkpoint's model.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("prompt", help="text to continue; - reads standard input")
    parser.add_argument("--max-tokens", type=int, help="tokens to generate at most (default: the checkpoint's)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the checkpoint's)")
    parser.add_argument("--top-p", type=float, help="nucleus mass (default: the checkpoint's)")
    parser.add_argument("--top-k", type=int, help="tokens to choose from, 0 for all (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, help="repeat a sample (default: a fresh one)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="type to compute in (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to compute (default %(default)s)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on behind the end of a document")
    return parser


def _run(args: argparse.Namespace) -> None:
    limit_threads()
    defaults = load_generation_config(args.checkpoint)
    params = SamplingParams(
        temperature=defaults.temperature if args.temperature is None else args.temperature,
        top_p=defaults.top_p if args.top_p is None else args.top_p,
        top_k=defaults.top_k if args.top_k is None else args.top_k,
        seed=secrets.randbits(63) if args.seed is None else args.seed,
    )
    max_tokens = defaults.max_new_tokens if args.max_tokens is None else args.max_tokens
    if max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {max_tokens}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no CUDA device is available")
    tokenizer = load_tokenizer(args.checkpoint)
    model = load_model(args.checkpoint, dtype=_DTYPES[args.dtype], device=args.device)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    eos_ids = frozenset() if args.ignore_eos else frozenset(defaults.eos_token_ids)
    decoder = TextDecoder(tokenizer)
    sys.stdout.write(text)
    sys.stdout.flush()
    for token in generate(model, tokenizer.encode(text), max_tokens, params, eos_ids):
        sys.stdout.write(decoder.add(token))
        sys.stdout.flush()
    sys.stdout.write(decoder.finish() + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 for a checkpoint or a value that does not do, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (CheckpointError, ValueError, OSError, RuntimeError) as error:
        print(f"lrt-generate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
