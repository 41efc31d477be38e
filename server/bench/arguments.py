"""The flags of `lrt-bench`, a set for each mode. No torch, so that a wrong flag is answered at once."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from server.bench.http_client import Address
from server.bench.shapes import D12_NAME, VARIANTS

KEY_VARIABLE = "OPENAI_API_KEY"
DTYPES = ("auto", "float32", "bfloat16")
SEVERAL_MODELS = ("offline", "prefill", "beside", "growth")
"""Modes that measure several variants of the bench model in this process."""


def make_parser() -> argparse.ArgumentParser:
    """The parser; every mode's arguments carry its name as `mode`."""
    parser = argparse.ArgumentParser(
        prog="lrt-bench",
        description="Measures speed as ratios within one run, beside what the machine could do.",
        epilog=EPILOG,
    )
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    for name, (add, about) in _MODES.items():
        add(modes.add_parser(name, help=about, description=about[0].upper() + about[1:] + "."))
    return parser


EPILOG = "lrt-bench MODE --help lists a mode's flags."


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. A wrong one is a line on stderr and SystemExit(2)."""
    parser = make_parser()
    args = parser.parse_args(argv)
    problem = _problem(args)
    if problem is not None:
        parser.error(problem)
    if "variant" in args and args.variant is None:
        args.variant = list(VARIANTS) if args.mode in SEVERAL_MODELS else ["layerwise"]
    if args.mode == "serve":
        key = os.environ.get(KEY_VARIABLE, "")
        args.api_key = key if args.api_key is None else args.api_key
        args.compare_api_key = key if args.compare_api_key is None else args.compare_api_key
    return args


def _problem(args: argparse.Namespace) -> str | None:
    """What does not go together, if anything."""
    if getattr(args, "variant", None) and args.mode != "checkpoint" and args.model != D12_NAME:
        return "--variant is for --model d12; a checkpoint has the recurrence that it has"
    if args.mode == "serve" and args.url is not None and (args.model or args.server_flags or args.threads):
        return "--url measures a running server; --model, --threads and --server-flags are for one that is started here"
    if args.mode == "serve" and args.model_name and args.url is None:
        return "--model-name is for --url"
    if args.mode == "serve" and args.compare_model and args.compare is None:
        return "--compare-model is for --compare"
    if args.mode == "serve" and args.api_key is not None and args.url is None:
        return "--api-key is for --url"
    if args.mode == "serve" and args.compare_api_key is not None and args.compare is None:
        return "--compare-api-key is for --compare"
    return None


def _common(parser: argparse.ArgumentParser, repetitions: int = 3) -> None:
    parser.add_argument("--repetitions", type=_at_least(3), default=repetitions, help="at least 3 (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there too")
    parser.add_argument("--threads", type=_at_least(1), metavar="N", help="of torch (default: as the server would choose)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as the server would choose")


def _model(parser: argparse.ArgumentParser, several: bool = True, both: bool = False) -> None:
    forms, about = (["both", "all"], "; both: none and int8, in turns; all: every form") if both else ([], "")
    parser.add_argument(
        "--quantize", choices=["none", "int8", "int8-memory", *forms], default="none", help=f"weights in 8 bits{about}"
    )
    parser.add_argument("--model", type=_model_name, help="d12 or a checkpoint (default: the bundled one)")
    nargs, default = ("+", "all") if several else (1, "layerwise")
    parser.add_argument("--variant", choices=VARIANTS, nargs=nargs, help=f"of d12's recurrence (default: {default})")


def _sizes(parser: argparse.ArgumentParser, prompt_len: int, new_tokens: int | None = None) -> None:
    parser.add_argument("--prompt-len", type=_at_least(2), default=prompt_len, help="tokens (default %(default)s)")
    if new_tokens is not None:
        parser.add_argument("--new-tokens", type=_at_least(2), default=new_tokens, help="per request (default %(default)s)")


def _offline(parser: argparse.ArgumentParser) -> None:
    _model(parser, both=True)
    parser.add_argument("--clients", type=_at_least(1), nargs="+", default=[1, 4, 16], metavar="N")
    _sizes(parser, 32, 128)
    _common(parser)


def _prefill(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _sizes(parser, 256)
    _common(parser)


def _beside(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--clients", type=_at_least(1), nargs="+", default=[1, 8], metavar="N")
    _sizes(parser, 2000)
    parser.add_argument(
        "--max-steps", type=_at_least(64), default=1024, metavar="N", help="of one repetition (default %(default)s)"
    )
    _common(parser)


def _serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _model(parser, several=False)
    add("--url", type=_url, help="measure the server there instead of starting one")
    add("--model-name", metavar="NAME", help="what --url calls its model (default: the first that it lists)")
    add("--compare", type=_url, metavar="URL", help="another OpenAI-compatible server, measured in turns")
    add("--compare-model", metavar="NAME", help="what it calls its model (default: the first that it lists)")
    add("--api-key", type=_key, metavar="KEY", help=f"for --url (default: the variable {KEY_VARIABLE})")
    add("--compare-api-key", type=_key, metavar="KEY", help=f"for --compare (default: the variable {KEY_VARIABLE})")
    add("--clients", type=_at_least(1), nargs="+", metavar="N", help="closed loop (default 1 4 16 without --rate)")
    add("--rate", type=_positive, nargs="+", metavar="R", help="open loop: random arrivals, requests per second")
    add("--requests", type=_at_least(1), metavar="N", help="per repetition (default: twice the clients; the rate for 10 s)")
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help="server-sent events or whole answers")
    add("--prompts", choices=("ids", "text"), default="ids", help="what prompts are made of (default ids)")
    add("--timeout", type=_positive, default=300.0, metavar="SECONDS", help="of one request (default 300)")
    add("--max-seconds", type=_positive, default=300.0, metavar="SECONDS", help="of one repetition (default 300)")
    add("--server-flags", type=shlex.split, default=[], metavar="'FLAGS'", help="more flags for the server started here")
    _sizes(parser, 32, 128)
    _common(parser)


def _kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="kernels whose line holds one of these")
    _common(parser, repetitions=5)


def _growth(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _model(parser)
    add("--batches", type=_at_least(1), nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="N")
    add("--contexts", type=_at_least(2), nargs="+", default=[128, 512, 1024, 2048], metavar="N", help="tokens")
    add(
        "--prompt-lens",
        type=_at_least(2),
        nargs="+",
        default=[128, 256, 512, 1024, 2048, 4096, 8192],
        metavar="N",
        help="tokens",
    )
    add("--plots", type=Path, metavar="DIR", help="draw decode.png and prompts.png there (needs matplotlib)")
    _common(parser)


def _scheduler(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sequences", type=_at_least(1), nargs="+", default=[1, 8, 32, 128], metavar="N")
    add("--context", type=_at_least(8), default=512, help="tokens of each at first (default %(default)s)")
    add("--new-tokens", type=_at_least(2), default=64, help="until another takes its place (default %(default)s)")
    add("--steps", type=_at_least(1), default=200, help="of one repetition (default %(default)s)")
    _common(parser, repetitions=5)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", choices=(D12_NAME,), help="the bench model")
    parser.add_argument("directory", type=Path, metavar="DIR", help="what to write")
    parser.add_argument("--variant", choices=VARIANTS, nargs=1, help="of its recurrence (default: layerwise)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of its matrices (default bfloat16)")


def _train(parser: argparse.ArgumentParser) -> None:
    """Nothing: `__main__.py` hands this mode's flags on before any is read here."""


TRAIN = "train"
_MODES: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "offline": (_offline, "the engine alone: decoding, and what recurrence costs"),
    "prefill": (_prefill, "the engine alone: reading a prompt by windows, token by token, and without recurrence"),
    "beside": (_beside, "a decode step's time while a long prompt is read beside it"),
    "serve": (_serve, "a server under HTTP load, beside the engine alone or another server"),
    "kernels": (_kernels, "each native kernel against its torch twin and the machine's limits"),
    "growth": (_growth, "a step's time against batch and context, a prompt's against its length"),
    "scheduler": (_scheduler, "what the engine does in a step besides computing"),
    TRAIN: (_train, "a training step of every schedule beside a plain model's"),
    "checkpoint": (_checkpoint, "write the bench model as a checkpoint that lrt-server serves"),
}


def _at_least(bound: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < bound:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {bound}, got {text!r}")
        return int(text)

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _url(text: str) -> str:
    try:
        Address.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text.rstrip("/")


def _key(text: str) -> str:
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise argparse.ArgumentTypeError("must be printable ASCII without spaces")
    return text


def _model_name(text: str) -> str | Path:
    if text == D12_NAME or Path(text).is_dir():
        return text if text == D12_NAME else Path(text)
    raise argparse.ArgumentTypeError(f"{text}: no such directory, and not d12")
