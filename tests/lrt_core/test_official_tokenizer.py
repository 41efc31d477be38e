"""The authors' tokenizer files. Every hostile pickle here would leave a file behind if any part of it ran."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from lrt_core import official_tokenizer
from lrt_core.files import CheckpointError
from lrt_core.official_tokenizer import (
    BYTES_FILE,
    CHAT_TOKENS,
    PICKLE_FILE,
    official_byte_lengths,
    read_official_tokenizer,
    write_official_tokenizer,
)
from lrt_core.tokenizer import Tokenizer
from tests.helpers import GOLDEN, PLAIN_GOLDEN, tiny_tokenizer

FOLDER = GOLDEN / PLAIN_GOLDEN / "tokenizer"
STATE = {
    "name": "rustbpe",
    "pat_str": r"\w+|\W",
    "mergeable_ranks": {bytes([byte]): byte for byte in range(256)},
    "special_tokens": {"<|bos|>": 256},
}


def refused(folder: Path, data: bytes, message: str) -> None:
    (folder / PICKLE_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_official_tokenizer(folder)


def encoding(state: object) -> bytes:
    """A pickle of the shape that a real one has, with any state."""
    body = pickle.dumps(state, protocol=4)[2:-1]  # without PROTO and STOP
    body = body[9:] if body[:1] == pickle.FRAME else body
    start = b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81"
    return start + body + b"b."


def test_real_file_is_read() -> None:
    tokenizer, name = read_official_tokenizer(FOLDER)
    assert name == "rustbpe"
    assert tokenizer.vocab_size == 300
    assert tokenizer.encode("") == [tokenizer.bos_id] == [291]
    assert tokenizer.eos_tokens == ("<|assistant_end|>", "<|bos|>")
    reference = pickle.loads((FOLDER / PICKLE_FILE).read_bytes())
    text = "Hello, wörld! 12345 <|bos|>\n\n\tthe end"
    assert tokenizer.encode(text, add_bos=False) == reference.encode_ordinary(text)


def test_written_files_equal_the_authors(tmp_path: Path) -> None:
    tokenizer, name = read_official_tokenizer(FOLDER)
    write_official_tokenizer(tmp_path, tokenizer, name)
    assert (tmp_path / PICKLE_FILE).read_bytes() == (FOLDER / PICKLE_FILE).read_bytes()
    lengths, expected = (torch.load(folder / BYTES_FILE, weights_only=True) for folder in (tmp_path, FOLDER))
    assert lengths.dtype == expected.dtype
    assert torch.equal(lengths, expected)


def test_own_tokenizer_is_readable_by_the_authors_code(tmp_path: Path) -> None:
    """Their code unpickles freely and then uses the Encoding; so does this test, on a file it wrote itself."""
    tokenizer = tiny_tokenizer()
    write_official_tokenizer(tmp_path, tokenizer, "mine")
    unpickled = pickle.loads((tmp_path / PICKLE_FILE).read_bytes())
    assert isinstance(unpickled, tiktoken.Encoding)
    assert unpickled.n_vocab == tokenizer.vocab_size
    assert unpickled.encode_ordinary("the import") == tokenizer.encode("the import", add_bos=False)
    back, name = read_official_tokenizer(tmp_path)
    assert (back.ranks, back.special_tokens, name) == (tokenizer.ranks, tokenizer.special_tokens, "mine")


def test_authors_byte_lengths_count_a_cut_character_as_three() -> None:
    tokenizer = tiny_tokenizer()
    official, true = official_byte_lengths(tokenizer), tokenizer.byte_lengths()
    assert official[:128] == true[:128]
    assert (official[0xE9], true[0xE9]) == (3, 1)
    assert official[-5:] == true[-5:] == [0] * 5


def test_crafted_state_is_admitted(tmp_path: Path) -> None:
    """The frame that the refusals below fill with something else is itself a good one."""
    (tmp_path / PICKLE_FILE).write_bytes(encoding(STATE))
    tokenizer, _ = read_official_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 257
    assert tokenizer.chat_template is None
    assert tokenizer.eos_tokens == ("<|bos|>",)


def test_chat_template_needs_every_chat_token(tmp_path: Path) -> None:
    special = {name: 256 + index for index, name in enumerate(("<|bos|>", *CHAT_TOKENS))}
    (tmp_path / PICKLE_FILE).write_bytes(encoding({**STATE, "special_tokens": special}))
    assert read_official_tokenizer(tmp_path).tokenizer.chat_template is not None
    del special["<|assistant_end|>"]
    (tmp_path / PICKLE_FILE).write_bytes(encoding({**STATE, "special_tokens": special}))
    assert read_official_tokenizer(tmp_path).tokenizer.chat_template is None


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def hostile(marker: Path) -> dict[str, bytes]:
    """Pickles that would create `marker`, each by another road."""
    command = f"touch {marker}"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    good = encoding(STATE)
    inside = {**STATE, "name": Call(os.system, command)}
    return {
        "os.system": pickle.dumps(Call(os.system, command)),
        "os.system, protocol 0": pickle.dumps(Call(os.system, command), protocol=0),
        "os.system, protocol 2": pickle.dumps(Call(os.system, command), protocol=2),
        "eval": pickle.dumps(Call(eval, code)),
        "in the state": encoding(inside),
        "in a special token": encoding({**STATE, "special_tokens": {"<|bos|>": Call(eval, code)}}),
        "in a list in the state": encoding({**STATE, "name": [Call(eval, code)]}),
        "before a good one": pickle.dumps(Call(eval, code))[:-1] + b"0" + good[2:],
        "INST": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "GLOBAL and REDUCE": b"cbuiltins\neval\n(S" + repr(code).encode() + b"\ntR.",
        "NEWOBJ of a callable": b"\x80\x04" + short("posix") + short("system") + b"\x93" + short(command) + b"\x85\x81.",
        "dotted name": b"\x80\x04" + short("tiktoken.core") + short("Encoding.__init__.__globals__") + b"\x93.",
        "BUILD that sets __setstate__": (
            b"\x80\x04" + short("tiktoken.core") + short("Encoding") + b"\x93)\x81}"
            + short("__setstate__") + short("os") + short("system") + b"\x93sb" + short(command) + b"b."
        ),
        "BUILD on the class": (
            b"\x80\x04" + short("tiktoken.core") + short("Encoding") + b"\x93}"
            + short("__setstate__") + short("posix") + short("system") + b"\x93sb)\x81" + short(command) + b"b."
        ),
        "extension registry": b"\x80\x02\x82\x01.",
        "persistent id": b"P" + command.encode() + b"\n.",
    }  # fmt: skip


HOSTILE = list(hostile(Path("x")))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_do_not_run(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    refused(tmp_path, hostile(marker)[name], f"{PICKLE_FILE}: not a tokenizer pickle")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "INST", "OBJ", "GLOBAL and REDUCE", "in the state"])
def test_hostile_pickles_are_hostile(name: str, tmp_path: Path) -> None:
    """The test above proves something only if these do run in a plain unpickler."""
    marker = tmp_path / "ran"
    try:
        pickle.loads(hostile(marker)[name])
    except Exception:  # some end badly after having run
        assert marker.exists()
    assert marker.exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_the_unpickler_alone_refuses_them_too(name: str, tmp_path: Path) -> None:
    """The check of operations and the check of classes each suffice: no such pickle runs with the first one out of the way."""
    marker = tmp_path / "ran"
    try:
        result = official_tokenizer._Unpickler(io.BytesIO(hostile(marker)[name])).load()
    except Exception as error:
        result = error
    assert not marker.exists()
    assert not isinstance(result, official_tokenizer._Encoding) or not isinstance(result.state, dict)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("gpt2", "does not hold exactly name, pat_str"),
        (None, "does not hold exactly|not a tokenizer pickle"),
        ({**STATE, "extra": 1}, "does not hold exactly"),
        ({key: value for key, value in STATE.items() if key != "name"}, "does not hold exactly"),
        ({**STATE, "name": 3}, "name must be str, got int"),
        ({**STATE, "pat_str": b"x"}, "pat_str must be str, got bytes"),
        ({**STATE, "pat_str": "("}, "is not a regular expression"),
        ({**STATE, "mergeable_ranks": "x"}, "mergeable_ranks must be dict, got str"),
        ({**STATE, "mergeable_ranks": {"a": 1}}, "mergeable_ranks must map bytes to int"),
        ({**STATE, "mergeable_ranks": {b"a": b"1"}}, "mergeable_ranks must map bytes to int"),
        ({**STATE, "mergeable_ranks": {b"a": 0}, "special_tokens": {"<|bos|>": 1}}, "no token for the single byte 0x00"),
        ({**STATE, "special_tokens": {b"<|bos|>": 256}}, "special_tokens must map str to int"),
        ({**STATE, "special_tokens": {"<|bos|>": 255}}, "have the same id 255"),
        ({**STATE, "special_tokens": {"<|endoftext|>": 256}}, r"has no special token <\|bos\|>"),
    ],
)
def test_bad_states_are_named(state: object, message: str, tmp_path: Path) -> None:
    refused(tmp_path, encoding(state), message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a tokenizer pickle"),
        (b"not a pickle", "not a tokenizer pickle"),
        (encoding(STATE)[:-40], "not a tokenizer pickle"),
        (encoding(STATE) + b"more", "4 bytes follow its end"),
        (pickle.dumps({"name": "x"}, protocol=4), "holds a dict, not a tiktoken Encoding"),
        (b"\x80\x04" + short("tiktoken.core") + short("Encoding") + b"\x93.", "holds a type, not a tiktoken Encoding"),
        (b"\x80\x04" + short("tiktoken.load") + short("Encoding") + b"\x93.", "refers to tiktoken.load.Encoding"),
        # Claims of sizes that the file does not have, and a memo slot that would allocate gigabytes.
        (b"\x80\x04B" + struct.pack("<I", 2**31 - 1) + b"x.", "not a tokenizer pickle"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "not a tokenizer pickle"),
        (b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b".", "operation (NONE|LONG_BINPUT)"),
        # Tuples of tuples, whose hash as a key would take 2**64 steps.
        (b"\x80\x04})" + b"2\x86" * 64 + b"Ns.", "operation DUP"),
    ],
)
def test_other_content_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    refused(tmp_path, data, message)


def test_oversized_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / PICKLE_FILE).open("wb") as file:
        file.truncate(official_tokenizer.MAX_PICKLE_BYTES + 1)  # sparse: takes no space
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("was read"))
    with pytest.raises(CheckpointError, match="too large for a tokenizer"):
        read_official_tokenizer(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_official_tokenizer(tmp_path)


def test_every_operation_of_a_real_pickle_is_admitted_and_no_more() -> None:
    used: set[str] = set()
    long_names = {"x" * 300: 300}
    for data in ((FOLDER / PICKLE_FILE).read_bytes(), encoding({**STATE, "special_tokens": long_names})):
        used |= {operation.name for operation, _, _ in pickletools.genops(data)}
    assert used <= official_tokenizer._OPERATIONS
    dangerous = {"REDUCE", "GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
    assert not dangerous & official_tokenizer._OPERATIONS


def render(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment()
    assert tokenizer.chat_template is not None
    template = environment.from_string(tokenizer.chat_template, globals={"raise_exception": raise_exception})
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_chat_template() -> None:
    tokenizer, _ = read_official_tokenizer(FOLDER)
    turns = [message("user", " Hi \n"), message("assistant", "Yo"), message("user", "Bye")]
    framed = "<|user_start|> Hi \n<|user_end|><|assistant_start|>Yo<|assistant_end|><|user_start|>Bye<|user_end|>"
    assert render(tokenizer, turns) == "<|bos|>" + framed
    assert render(tokenizer, turns, True) == "<|bos|>" + framed + "<|assistant_start|>"
    with_system = render(tokenizer, [message("system", "Be kind."), *turns])
    assert with_system == "<|bos|>" + framed.replace(" Hi", "Be kind.\n\n Hi", 1)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [message("system", "x")],
        [message("assistant", "x")],
        [message("user", "x"), message("system", "y")],
        [message("user", "x"), message("tool", "y")],
    ],
)
def test_chat_template_refuses_what_the_model_never_saw(messages: list[dict[str, str]]) -> None:
    tokenizer, _ = read_official_tokenizer(FOLDER)
    with pytest.raises(ValueError, match=r"must come from|come from user"):
        render(tokenizer, messages)
