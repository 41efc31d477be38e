"""The tokenizer files of the authors' release, both ways: `tokenizer.pkl` and `token_bytes.pt`.

`tokenizer.pkl` is a pickle of a tiktoken Encoding. A pickle is a program, so it is never run freely: its operations are first
checked against the few that such a pickle is made of, and what it then builds is an inert record of names and numbers,
validated like any other input. `official.py` uses this module for whole checkpoints.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch

from lrt_core.files import CheckpointError, sync
from lrt_core.tokenizer import Tokenizer, TokenizerError

PICKLE_FILE = "tokenizer.pkl"
BYTES_FILE = "token_bytes.pt"
MAX_PICKLE_BYTES = 64 * 1024**2
"""Far above any real tokenizer (200 000 tokens take 4 MB); a larger file is refused unread."""

BOS = "<|bos|>"
ASSISTANT_END = "<|assistant_end|>"
CHAT_TOKENS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", ASSISTANT_END)

CHAT_TEMPLATE = """\
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- if not turns or turns[0]['role'] != 'user' -%}
{{ raise_exception('The first message after an optional system message must come from the user') }}
{%- endif -%}
<|bos|>
{%- for message in turns -%}
{%- if message['role'] not in ('user', 'assistant') -%}
{{ raise_exception('Messages come from user or assistant, and from system only as the first') }}
{%- endif -%}
{{- '<|' + message['role'] + '_start|>' -}}
{%- if has_system and loop.first -%}{{- messages[0]['content'] + '\\n\\n' -}}{%- endif -%}
{{- message['content'] + '<|' + message['role'] + '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""
"""Jinja2: bos, then each turn as start, text and end; a system message opens the first user message. Like other templates of
its kind it needs a `raise_exception` function from whoever renders it."""

# fmt: off
_OPERATIONS = frozenset((
    "PROTO", "FRAME", "MEMOIZE", "BINGET", "LONG_BINGET", "MARK", "STOP",
    "STACK_GLOBAL", "EMPTY_TUPLE", "NEWOBJ", "BUILD", "EMPTY_DICT", "SETITEM", "SETITEMS",
    "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT", "BININT1", "BININT2",
))
# fmt: on
"""What pickling an Encoding emits since Python 3.8. No call, no list, no nested tuple, no choice of memo slots: nothing that
can run code or make a small file cost much memory or time."""


class OfficialTokenizer(NamedTuple):
    """A tokenizer, and the name that the authors' Encoding carried (needed to write it back)."""

    tokenizer: Tokenizer
    encoding_name: str


class _Encoding:
    """Stands in for tiktoken's class while unpickling: keeps the state it is given and does nothing."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise pickle.UnpicklingError(f"it refers to {module}.{name}; only a tiktoken Encoding is admitted")


def read_official_tokenizer(directory: Path) -> OfficialTokenizer:
    """The tokenizer in the authors' tokenizer folder; CheckpointError on anything but an Encoding of plain data."""
    path = directory / PICKLE_FILE
    state = _encoding_state(path, _read(path))
    special_tokens = state["special_tokens"]
    if BOS not in special_tokens:
        raise CheckpointError(f"{path}: has no special token {BOS}, which opens every document")
    eos_tokens = [name for name in (ASSISTANT_END, BOS) if name in special_tokens]
    chat_template = CHAT_TEMPLATE if all(name in special_tokens for name in CHAT_TOKENS) else None
    try:
        tokenizer = Tokenizer(state["pat_str"], state["mergeable_ranks"], special_tokens, BOS, eos_tokens, True, chat_template)
    except TokenizerError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return OfficialTokenizer(tokenizer, state["name"])


def write_official_tokenizer(directory: Path, tokenizer: Tokenizer, encoding_name: str) -> None:
    """Write both files into an existing folder, for the authors' code to read."""
    encoding = tiktoken.Encoding(
        encoding_name,
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
    )
    (directory / PICKLE_FILE).write_bytes(pickle.dumps(encoding, protocol=4))
    torch.save(torch.tensor(official_byte_lengths(tokenizer), dtype=torch.int32), directory / BYTES_FILE)
    for name in (PICKLE_FILE, BYTES_FILE):
        sync(directory / name)


def official_byte_lengths(tokenizer: Tokenizer) -> list[int]:
    """Bytes per id as the authors count them: of the token decoded by itself, 0 for special tokens.

    A token that is only part of a character decodes to U+FFFD and so counts three bytes, unlike `Tokenizer.byte_lengths`.
    """
    special = set(tokenizer.special_tokens.values())
    return [0 if id in special else len(tokenizer.decode([id]).encode("utf-8")) for id in range(tokenizer.vocab_size)]


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: {size} bytes is too large for a tokenizer (at most {MAX_PICKLE_BYTES})")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _encoding_state(path: Path, data: bytes) -> dict[str, Any]:
    try:
        _check_operations(data)
        encoding = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle can raise nearly anything
        raise CheckpointError(f"{path}: not a tokenizer pickle: {error}") from None
    if type(encoding) is not _Encoding:
        raise CheckpointError(f"{path}: holds a {type(encoding).__name__}, not a tiktoken Encoding")
    state = encoding.state
    kinds = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
    if type(state) is not dict or set(state) != set(kinds):
        raise CheckpointError(f"{path}: the Encoding does not hold exactly {', '.join(kinds)}")
    for key, kind in kinds.items():
        if type(state[key]) is not kind:
            raise CheckpointError(f"{path}: {key} must be {kind.__name__}, got {type(state[key]).__name__}")
    _check_ids(path, "mergeable_ranks", state["mergeable_ranks"], bytes)
    _check_ids(path, "special_tokens", state["special_tokens"], str)
    return state


def _check_operations(data: bytes) -> None:
    for operation, _, position in pickletools.genops(data):
        assert position is not None
        if operation.name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"operation {operation.name} at byte {position} has no place in one")
        if operation.name == "STOP" and position != len(data) - 1:
            raise pickle.UnpicklingError(f"{len(data) - 1 - position} bytes follow its end")


def _check_ids(path: Path, key: str, ids: dict[Any, Any], kind: type) -> None:
    if not all(type(token) is kind and type(id) is int for token, id in ids.items()):
        raise CheckpointError(f"{path}: {key} must map {kind.__name__} to int")
