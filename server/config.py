"""The server's settings: flags, each also an environment variable `LRT_...`. A flag beats the environment, which beats the
default.

Neighbours: `__main__.py` reads them once and hands the engine's part to `engine/loader.py`. Imports no torch, so that a wrong
flag is answered at once.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

Number = TypeVar("Number", int, float)

PREFIX = "LRT_"
LOG_LEVELS = ("debug", "info", "warning", "error")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class ServerConfig:
    """Everything a user can set. None lets checkpoint and machine decide. Sizes are in tokens unless their flag says bytes."""

    checkpoint: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    chat_template: Path | None = None
    api_key: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["none", "int8", "int8-memory"] = "none"
    device: str = "cpu"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_waiting: int = 1024
    kv_cache_memory: int | None = None
    block_size: int = 16
    prefill: Literal["window", "sequential"] = "window"
    prefill_window: int | None = None
    prefill_tolerance: float | None = None
    no_prefix_caching: bool = False
    threads: int | None = None
    deterministic: bool = False
    check_invariants: bool = False
    max_body_size: int = 16 * 2**20
    max_logprobs: int = 20
    stream_interval: int = 1
    shutdown_timeout: float = 60.0
    lenient: bool = False
    metrics_prefix: str = "lrt"
    stay_on_failure: bool = False
    log_level: str = "info"


def _at_least(kind: Callable[[str], Number], bound: Number) -> Callable[[str], Number]:
    """An argument type: a finite number of this kind, not below `bound`."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or value < bound:
            raise argparse.ArgumentTypeError(f"must be at least {bound}, got {text}")
        return value

    return parse


def _port(text: str) -> int:
    value = _at_least(int, 0)(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, got {text}")
    return value


def parse_bytes(text: str) -> int:
    """Bytes from a number with an optional unit: 4096, 512M, 1.5G, 2GiB (K, M, G and T are powers of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 2G")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be at least one byte, got {text}")
    return size


def _prefix(text: str) -> str:
    if re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} cannot begin a metric's name: letters, digits and _ only")
    return text


def _device(text: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device: cpu, cuda or cuda:N")
    return text


def _host(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if "" in names:
        raise argparse.ArgumentTypeError(f"{text!r} holds an empty name")
    return names


def _keys(text: str) -> tuple[str, ...]:
    """API keys from a list with commas. What is wrong with one is said without saying it."""
    keys = tuple(key.strip() for key in text.split(","))
    if not all(re.fullmatch("[!-~]+", key) for key in keys):
        raise argparse.ArgumentTypeError("a key is one or more visible ASCII characters, without commas and blanks")
    return keys


def _switch(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False, "": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


_count, _seconds = _at_least(int, 1), _at_least(float, 0.0)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line. Defaults are left out of it: `parse_config` fills them in after the environment."""
    parser = _Parser(
        prog="lrt-server",
        description="Serve a Latent Recurrent Transformer over an OpenAI-compatible HTTP API.",
        epilog="Every flag is also an environment variable: --max-model-len is LRT_MAX_MODEL_LEN.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    # No type=Path: before Python 3.12 argparse would convert the missing argument's marker SUPPRESS too.
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="directory; the bundled one without it")
    _add_http(parser.add_argument_group("HTTP"))
    _add_engine(parser.add_argument_group("engine"))
    return parser


def _add_http(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--host", type=_host, help="address to listen on (default 127.0.0.1)")
    add("--port", type=_port, help="port to listen on, 0 for any free one (default 8000)")
    add(
        "--served-model-name",
        type=_names,
        metavar="NAME[,NAME]",
        help="names that requests may use, the first in metrics (default: the directory's name)",
    )
    add("--chat-template", metavar="FILE", help="a Jinja2 chat template (default: the checkpoint's)")
    add(
        "--api-key",
        type=_keys,
        action="extend",
        metavar="KEY[,KEY]",
        help="keys of which a request must carry one; may be repeated (default: none is needed)",
    )
    add("--api-key-file", metavar="FILE", help="more such keys, one a line")
    add("--max-body-size", type=parse_bytes, metavar="BYTES", help="largest request body, such as 512K (default 16M)")
    add("--max-logprobs", type=_at_least(int, 0), metavar="N", help="most logprobs a token may be asked for (default 20)")
    add(
        "--stream-interval",
        type=_count,
        metavar="N",
        help="tokens of a choice in one event of a stream, after the first; wait at most a silent second (default 1)",
    )
    add("--shutdown-timeout", type=_seconds, metavar="SECONDS", help="how long running requests may finish (default 60)")
    add("--lenient", action="store_true", help="answer unknown fields with a warning header instead of a 400")
    add(
        "--metrics-prefix",
        type=_prefix,
        metavar="PREFIX",
        help="of metric names; vllm suits its dashboards (default lrt)",
    )
    add("--stay-on-failure", action="store_true", help="keep answering probes after the engine failed instead of exiting")
    add("--log-level", choices=LOG_LEVELS, help="debug also logs every request (default info)")


def _add_engine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of weights and cache; auto: bfloat16 where it pays")
    add(
        "--quantize",
        choices=("none", "int8", "int8-memory"),
        help="weights in 8 bits: all, or the memory projections alone; native kernels only (default none)",
    )
    add("--device", type=_device, help="cpu, cuda or cuda:N (default cpu)")
    add("--max-model-len", type=_count, metavar="N", help="longest prompt and output together (default: the trained context)")
    add("--max-num-seqs", type=_count, metavar="N", help="sequences that run at once (default 64)")
    add("--max-num-batched-tokens", type=_count, metavar="N", help="rows of one step's forward (default 512)")
    add(
        "--max-num-waiting",
        type=_at_least(int, 0),
        metavar="N",
        help="longest queue; beyond it 429 (default 1024)",
    )
    add(
        "--kv-cache-memory",
        type=parse_bytes,
        metavar="BYTES",
        help="of the cache, such as 512M (default: what fits)",
    )
    add("--block-size", type=_count, metavar="N", help="tokens of one cache block (default 16)")
    add(
        "--prefill",
        choices=("window", "sequential"),
        help="how prompts are read (default window)",
    )
    add(
        "--prefill-window",
        type=_count,
        metavar="N",
        help="largest refinement window (default 16 with native kernels and recurrence, else 128; at most the rows of a step)",
    )
    add(
        "--prefill-tolerance",
        type=_seconds,
        metavar="X",
        help="relative change below which a memory counts as settled (default 1e-5 in float32, 4e-3 in bfloat16)",
    )
    add(
        "--threads",
        type=_count,
        metavar="N",
        help="threads of one operator (default: one per core, within a quota; 1 for a small model)",
    )
    add("--no-prefix-caching", action="store_true", help="compute every prompt anew instead of reusing common beginnings")
    add("--deterministic", action="store_true", help="bit-equal logprobs in any batch; prompts are read token by token")
    add("--check-invariants", action="store_true", help="verify the cache's books after every step; a failure stops the engine")


def parse_config(arguments: Sequence[str], environment: Mapping[str, str]) -> ServerConfig:
    """The settings of a command line and an environment. A wrong one is a line on stderr and SystemExit(2)."""
    parser = make_parser()
    values = {**_from_environment(parser, environment), **vars(parser.parse_args(arguments))}
    for name in ("checkpoint", "chat_template", "api_key_file"):
        if name in values:
            values[name] = Path(values[name])
    values["api_key"] = tuple(values.get("api_key", ()))
    return ServerConfig(**values)


def read_api_keys(settings: ServerConfig) -> tuple[str, ...]:
    """All keys: those of the settings, and of the file, where blank lines and those that begin with # are none. Raises
    ValueError for a file that cannot be read or has no keys: a server that was to have some must not start without."""
    path = settings.api_key_file
    if path is None:
        return settings.api_key
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"--api-key-file {path} cannot be read: {reason}") from None
    found: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            found += _keys(line) if line and not line.startswith("#") else ()
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--api-key-file {path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"--api-key-file {path} holds no key")
    return (*settings.api_key, *found)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings but are none, probably misspelt."""
    known = {variable(field.name) for field in fields(ServerConfig)}
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def _from_environment(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for action in parser._actions:
        text = environment.get(variable(action.dest))
        if text is None or action.dest == "help" or (text == "" and action.nargs != 0):
            continue  # an empty variable is an unset one
        try:
            values[action.dest] = _convert(action, text)
        except argparse.ArgumentTypeError as error:
            parser.error(f"environment variable {variable(action.dest)}: {error}")
    return values


def _convert(action: argparse.Action, text: str) -> object:
    if action.nargs == 0:
        return _switch(text)
    if action.choices is not None and text not in action.choices:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(action.choices)}")
    assert action.type is None or callable(action.type)
    return text if action.type is None else action.type(text)
