from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrt_core.files import CheckpointError
from lrt_core.tokenizer import CONFIG_FILE, RANKS_FILE, Tokenizer, TokenizerError
from tests.helpers import SPECIAL_NAMES, TINY_VOCAB_SIZE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BOS = TOKENIZER.special_tokens["<|bos|>"]


@given(st.text())
def test_text_survives(text: str) -> None:
    ids = TOKENIZER.encode(text, add_bos=False)
    assert TOKENIZER.decode(ids) == text
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode("utf-8")


def test_merges_apply() -> None:
    ids = TOKENIZER.encode("the import", add_bos=False)
    assert [TOKENIZER.token_bytes(id) for id in ids] == [b"th", b"e", b" ", b"im", b"po", b"rt"]


def test_lone_surrogate_becomes_the_replacement_character() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b", add_bos=False)) == "a\ufffdb"


def test_bos_follows_the_tokenizer_unless_told() -> None:
    assert TOKENIZER.encode("a") == [BOS, 97]
    assert TOKENIZER.encode("a", add_bos=False) == [97]
    assert TOKENIZER.encode("") == [BOS]
    silent = Tokenizer(TOKENIZER.pattern, TOKENIZER.ranks, {}, None, [], False, None)
    assert silent.encode("a") == [97]
    assert (silent.bos_id, silent.eos_ids) == (None, frozenset())
    with pytest.raises(TokenizerError, match="no bos token"):
        silent.encode("a", add_bos=True)


def test_special_tokens_in_text_are_text_unless_allowed() -> None:
    text = "x<|bos|>y"
    plain = TOKENIZER.encode(text, add_bos=False)
    assert BOS not in plain
    assert TOKENIZER.decode(plain) == text
    assert TOKENIZER.encode(text, add_bos=False, allow_special=True) == [ord("x"), BOS, ord("y")]


def test_cut_characters_decode_to_replacement() -> None:
    ids = TOKENIZER.encode("é", add_bos=False)
    assert len(ids) == 2
    assert TOKENIZER.decode(ids[:1]) == "\ufffd"


def test_byte_lengths_count_text_only() -> None:
    lengths = TOKENIZER.byte_lengths()
    assert len(lengths) == TINY_VOCAB_SIZE == TOKENIZER.vocab_size
    text = "def für(self): in 東京"
    assert sum(lengths[id] for id in TOKENIZER.encode(text)) == len(text.encode("utf-8"))
    assert [lengths[id] for id in TOKENIZER.special_tokens.values()] == [0] * len(SPECIAL_NAMES)
    assert TOKENIZER.token_bytes(BOS) == b"<|bos|>"


@pytest.mark.parametrize("id", [-1, TINY_VOCAB_SIZE])
def test_ids_out_of_range_are_named(id: int) -> None:
    with pytest.raises(TokenizerError, match=f"token id {id} is out of range 0..{TINY_VOCAB_SIZE - 1}"):
        TOKENIZER.decode([97, id])


@pytest.mark.filterwarnings("ignore")
def test_a_text_that_overflows_the_pattern_is_an_error_not_a_crash(capfd: pytest.CaptureFixture[str]) -> None:
    backtracking = Tokenizer(r"\s+(?!\S)|\s+|\S+", TOKENIZER.ranks, {}, None, [], False, None)
    with pytest.raises(TokenizerError, match="run of characters too long"):
        backtracking.encode(" " * 1_000_000 + "x")
    assert backtracking.decode(backtracking.encode("still  works")) == "still  works"
    capfd.readouterr()


def test_files_round_trip(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.from_directory(tmp_path)
    for name in ("pattern", "ranks", "special_tokens", "bos_token", "eos_tokens", "add_bos", "chat_template", "eos_ids"):
        assert getattr(loaded, name) == getattr(TOKENIZER, name), name
    text = "def fib(n):\n    return <|bos|>"
    assert loaded.encode(text, allow_special=True) == TOKENIZER.encode(text, allow_special=True)


def with_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def with_ranks(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / RANKS_FILE
        path.write_text(change(path.read_text()))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CONFIG_FILE).unlink(), f"{CONFIG_FILE}: file not found"),
        (lambda folder: (folder / RANKS_FILE).unlink(), f"{RANKS_FILE}: file not found"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), f"{CONFIG_FILE}: not valid JSON"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[" * 100_000), f"{CONFIG_FILE}: not valid JSON"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[]"), f"{CONFIG_FILE}: must hold a JSON object"),
        (lambda folder: (folder / CONFIG_FILE).write_text('{"add_bos": true, "add_bos": false}'), "repeated key 'add_bos'"),
        (lambda folder: (folder / CONFIG_FILE).write_bytes(b"\xff"), f"{CONFIG_FILE}: not UTF-8 text"),
        (with_config(extra=1), f"{CONFIG_FILE}: unknown key.*extra"),
        (with_config(pattern=3), "pattern must be str"),
        (with_config(pattern="("), "is not a regular expression"),
        (with_config(add_bos="yes"), "add_bos must be bool"),
        (with_config(bos_token=7), "bos_token must be a string or null"),
        (with_config(bos_token="<|nope|>"), "'<|nope|>' is not a special token"),
        (with_config(bos_token=None), "add_bos needs a bos_token"),
        (with_config(eos_tokens=["<|nope|>"]), "'<|nope|>' is not a special token"),
        (with_config(eos_tokens=[1]), "eos_tokens must be strings"),
        (with_config(special_tokens={"<|bos|>": 3}), "have the same id 3"),
        (with_config(special_tokens={"<|bos|>": "3"}), "has id '3'"),
        (with_config(special_tokens={"<|bos|>": 9000}), "no token has id 275"),
        (with_ranks(lambda text: text + "not base64\n"), "line 276 is not base64 bytes and a rank"),
        (with_ranks(lambda text: text + text.splitlines()[0] + "\n"), "line 276 repeats the token"),
        (with_ranks(lambda text: text[: len(text) // 2]), f"({RANKS_FILE}: line|{RANKS_FILE}: no token)"),
        (with_ranks(lambda text: text.replace("YQ== 97", "YWE= 97")), "no token for the single byte 0x61"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    TOKENIZER.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message.replace("|nope|", r"\|nope\|")):
        Tokenizer.from_directory(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Tokenizer.from_directory(tmp_path / "absent")
