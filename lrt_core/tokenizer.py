"""Text to token ids and back: byte-pair encoding from a checkpoint's files, run by tiktoken.

Two files hold a tokenizer: `tokenizer.tiktoken` (per line a token's bytes in base64 and its rank, which is its id) and
`tokenizer_config.json` (split pattern, special tokens, bos, eos); `chat_template.jinja` is the chat template's source, if there
is one. `checkpoint.py` writes them beside the weights, `official_tokenizer.py` makes one from the authors' files, `chat.py`
renders the template.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiktoken

from lrt_core.files import CheckpointError, check_keys, existing, read_json, read_text, write_json, write_text

RANKS_FILE = "tokenizer.tiktoken"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_KEYS = {"pattern", "special_tokens", "bos_token", "eos_tokens", "add_bos"}
_OLD_TEMPLATE_KEY = "chat_template"
"""Where checkpoints had their template before it got a file of its own; still read."""


class TokenizerError(ValueError):
    """A tokenizer that cannot exist, or ids it does not have."""


class Tokenizer:
    """Byte-pair encoding with special tokens; ids are exactly 0..vocab_size-1.

    pattern: regular expression that splits text before merging. ranks: id of each token's bytes, all 256 single bytes
    included. special_tokens: id of each name. bos_token opens a document (put before text when `add_bos`); eos_tokens
    end a generation; both name special tokens. chat_template: Jinja2 source or None. TokenizerError says what is wrong.
    """

    def __init__(
        self,
        pattern: str,
        ranks: dict[bytes, int],
        special_tokens: dict[str, int],
        bos_token: str | None,
        eos_tokens: Sequence[str],
        add_bos: bool,
        chat_template: str | None,
    ) -> None:
        self._bytes = _bytes_by_id(ranks, special_tokens)
        for name in (*([bos_token] if bos_token is not None else []), *eos_tokens):
            if name not in special_tokens:
                raise TokenizerError(f"{name!r} is not a special token of this tokenizer")
        if add_bos and bos_token is None:
            raise TokenizerError("add_bos needs a bos_token")
        self.pattern, self.ranks, self.special_tokens = pattern, dict(ranks), dict(special_tokens)
        self.bos_token, self.eos_tokens, self.add_bos = bos_token, tuple(eos_tokens), add_bos
        self.chat_template = chat_template
        self.bos_id = special_tokens[bos_token] if bos_token is not None else None
        self.eos_ids = frozenset(special_tokens[name] for name in eos_tokens)
        self._encoding = _encoding(pattern, self.ranks, self.special_tokens)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read the files; CheckpointError names the file and what is wrong in it."""
        directory = existing(directory)
        path = directory / CONFIG_FILE
        config = read_json(path)
        chat_template = _read_template(directory, config)
        check_keys(path, config, _CONFIG_KEYS)
        special_tokens, eos_tokens = config["special_tokens"], config["eos_tokens"]
        kinds = {"pattern": str, "special_tokens": dict, "eos_tokens": list, "add_bos": bool}
        for key, kind in kinds.items():
            if type(config[key]) is not kind:
                raise CheckpointError(f"{path}: {key} must be {kind.__name__}, got {config[key]!r}")
        if config["bos_token"] is not None and type(config["bos_token"]) is not str:
            raise CheckpointError(f"{path}: bos_token must be a string or null, got {config['bos_token']!r}")
        if not all(type(name) is str for name in eos_tokens):
            raise CheckpointError(f"{path}: eos_tokens must be strings, got {eos_tokens!r}")
        ranks = _read_ranks(directory / RANKS_FILE)
        try:
            return cls(
                config["pattern"],
                ranks,
                special_tokens,
                config["bos_token"],
                eos_tokens,
                config["add_bos"],
                chat_template,
            )
        except TokenizerError as error:
            raise CheckpointError(f"{path}: with {RANKS_FILE}: {error}") from None

    def save(self, directory: Path) -> None:
        """Write the files into an existing directory."""
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(self.ranks.items(), key=_rank))
        write_text(directory / RANKS_FILE, "".join(lines))
        config = {
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "bos_token": self.bos_token,
            "eos_tokens": list(self.eos_tokens),
            "add_bos": self.add_bos,
        }
        assert set(config) == _CONFIG_KEYS
        write_json(directory / CONFIG_FILE, config)
        if self.chat_template is not None:
            write_text(directory / TEMPLATE_FILE, self.chat_template)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._bytes)

    def encode(self, text: str, *, add_bos: bool | None = None, allow_special: bool = False) -> list[int]:
        """Ids of a text.

        add_bos: put bos first; None does what the tokenizer was made for. allow_special: a special token's name in the
        text becomes that token; otherwise it is plain text like any other, so that users cannot forge one. TokenizerError
        when bos is asked for and there is none, or when the split pattern gives up on the text.
        """
        add_bos = self.add_bos if add_bos is None else add_bos
        if add_bos and self.bos_id is None:
            raise TokenizerError("this tokenizer has no bos token")
        ids = self._encode(text, allow_special)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        try:
            if allow_special:
                return self._encoding.encode(text, allowed_special="all")
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # tiktoken's regular expressions overflow on, for one, a million spaces; it then raises an exception that is no
            # Exception and has no importable name, which would take a server down instead of answering its client.
            if type(error).__name__ != "PanicException":
                raise
            raise TokenizerError("the text has a run of characters too long for the tokenizer's split pattern") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. TokenizerError names an id out of range."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; of a special token, its name."""
        if not 0 <= id < len(self._bytes):
            raise TokenizerError(f"token id {id} is out of range 0..{len(self._bytes) - 1}")
        return self._bytes[id]

    def byte_lengths(self) -> list[int]:
        """Bytes of text per id, 0 for special tokens: what bits per byte divide by."""
        special = set(self.special_tokens.values())
        return [0 if id in special else len(token) for id, token in enumerate(self._bytes)]


def _rank(item: tuple[bytes, int]) -> int:
    return item[1]


def _bytes_by_id(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> list[bytes]:
    """Every id's bytes in order, after checking that the ids are exactly 0..n-1 and that all text can be encoded."""
    tokens: dict[int, bytes] = {}
    special = {name.encode("utf-8"): id for name, id in special_tokens.items()}
    for token, id in (*ranks.items(), *special.items()):
        if type(id) is not int or not token:
            raise TokenizerError(f"token {token!r} has id {id!r}: tokens are not empty and ids are integers")
        if id in tokens:
            raise TokenizerError(f"tokens {tokens[id]!r} and {token!r} have the same id {id}")
        tokens[id] = token
    missing = next((id for id in range(len(tokens)) if id not in tokens), None)
    if missing is not None:
        raise TokenizerError(f"no token has id {missing}: {len(tokens)} tokens need the ids 0..{len(tokens) - 1}")
    without = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if without is not None:
        raise TokenizerError(f"no token for the single byte {without:#04x}: some text could not be encoded")
    return [tokens[id] for id in range(len(tokens))]


def _encoding(pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> tiktoken.Encoding:
    try:
        return tiktoken.Encoding("lrt", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    except ValueError as error:
        raise TokenizerError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def _read_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The chat template's source from its file or, taken out of it, from the configuration of an older checkpoint."""
    old = config.pop(_OLD_TEMPLATE_KEY, None)
    if old is not None and type(old) is not str:
        raise CheckpointError(f"{directory / CONFIG_FILE}: {_OLD_TEMPLATE_KEY} must be a string or null, got {old!r}")
    path = directory / TEMPLATE_FILE
    if not path.exists():
        return old
    if old is not None:
        raise CheckpointError(f"{path}: {CONFIG_FILE} holds a chat template too; one of them must go")
    return read_text(path)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            token, rank = line.split(" ")
            decoded, id = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(f"{path}: line {number} is not base64 bytes and a rank: {line[:80]!r}") from None
        if decoded in ranks:
            raise CheckpointError(f"{path}: line {number} repeats the token {decoded!r}")
        ranks[decoded] = id
    return ranks
