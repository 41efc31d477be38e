"""Settings from flags and environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import ServerConfig, make_parser, parse_bytes, parse_config, unknown_variables, variable

EVERY_FLAG = {
    "--host": ("::1", "::1"),
    "--port": ("0", 0),
    "--served-model-name": ("a, b", ("a", "b")),
    "--dtype": ("bfloat16", "bfloat16"),
    "--quantize": ("int8", "int8"),
    "--max-logprobs": ("5", 5),
    "--stream-interval": ("4", 4),
    "--device": ("cuda:1", "cuda:1"),
    "--max-model-len": ("100", 100),
    "--max-num-seqs": ("3", 3),
    "--max-num-batched-tokens": ("77", 77),
    "--max-num-waiting": ("0", 0),
    "--kv-cache-memory": ("512M", 512 * 2**20),
    "--block-size": ("8", 8),
    "--prefill": ("sequential", "sequential"),
    "--prefill-window": ("9", 9),
    "--prefill-tolerance": ("1e-3", 1e-3),
    "--threads": ("2", 2),
    "--chat-template": ("a.jinja", Path("a.jinja")),
    "--api-key": ("a, b", ("a", "b")),
    "--api-key-file": ("keys", Path("keys")),
    "--max-body-size": ("1k", 1024),
    "--shutdown-timeout": ("0.5", 0.5),
    "--metrics-prefix": ("vllm", "vllm"),
    "--log-level": ("debug", "debug"),
}
OTHER_WORDS = {
    **{"--prefill": "window", "--dtype": "float32", "--device": "cpu", "--log-level": "error"},
    **{"--metrics-prefix": "lrt", "--quantize": "none"},
}
SWITCHES = ("--lenient", "--stay-on-failure", "--no-prefix-caching", "--check-invariants", "--deterministic")


def field(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def test_every_flag_is_tried_here() -> None:
    flags = {option for action in make_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert flags == {*EVERY_FLAG, *SWITCHES}


def test_defaults() -> None:
    assert parse_config([], {}) == ServerConfig()


@pytest.mark.parametrize("flag", EVERY_FLAG)
def test_flag_beats_environment_beats_default(flag: str) -> None:
    text, value = EVERY_FLAG[flag]
    name = field(flag)
    assert getattr(ServerConfig(), name) != value
    environment = {variable(name): text}
    assert getattr(parse_config([flag, text], {}), name) == value
    assert getattr(parse_config([], environment), name) == value
    other = OTHER_WORDS.get(flag, "12")
    assert getattr(parse_config([flag, other], environment), name) not in (value, None)


@pytest.mark.parametrize("flag", SWITCHES)
def test_switches(flag: str) -> None:
    name = field(flag)
    assert getattr(parse_config([flag], {variable(name): "false"}), name) is True
    for text, value in (("1", True), ("TRUE", True), ("yes", True), ("0", False), ("off", False), ("", False)):
        assert getattr(parse_config([], {variable(name): text}), name) is value


def test_checkpoint_is_positional() -> None:
    assert parse_config(["some/where"], {"LRT_CHECKPOINT": "else"}).checkpoint == Path("some/where")
    assert parse_config([], {"LRT_CHECKPOINT": "else"}).checkpoint == Path("else")


WRONG = [
    ("--port", "70000", "at most 65535"),
    ("--port", "-1", "at least 0"),
    ("--port", "http", "'http' is not a number"),
    ("--host", " ", "must not be empty"),
    ("--served-model-name", "a,", "empty name"),
    ("--dtype", "float16", "float16"),
    ("--device", "tpu", "is not a device"),
    ("--max-model-len", "0", "at least 1"),
    ("--max-num-seqs", "1.5", "is not a number"),
    ("--kv-cache-memory", "lots", "is not a size"),
    ("--kv-cache-memory", "0", "at least one byte"),
    ("--prefill", "parallel", "parallel"),
    ("--prefill-tolerance", "nan", "at least 0"),
    ("--prefill-tolerance", "-1", "at least 0"),
    ("--shutdown-timeout", "inf", "at least 0"),
    ("--metrics-prefix", "a:b", "cannot begin a metric's name"),
    ("--log-level", "loud", "loud"),
]


@pytest.mark.parametrize(("flag", "text", "message"), WRONG)
def test_a_wrong_setting_is_one_line_and_status_2(
    flag: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {variable(field(flag)): text}
    for arguments, variables, named in (([f"{flag}={text}"], {}, flag), ([], environment, *environment)):
        with pytest.raises(SystemExit) as exit:
            parse_config(arguments, variables)
        assert exit.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("lrt-server: error: ") and told.count("\n") == 1
        assert message in told and named in told


@pytest.mark.parametrize("arguments", [["a", "b"], ["--prot", "1"], ["--max-model", "3"], ["--port"]])
def test_an_unknown_argument_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse_config(arguments, {})
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_wrong_switch_in_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config([], {"LRT_LENIENT": "maybe"})
    assert "LRT_LENIENT: 'maybe' is neither true nor false" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("512M", 2**29), ("2G", 2**31), ("1.5 GiB", 3 * 2**29), ("3kb", 3072), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_misspelt_variables_are_found() -> None:
    environment = {"LRT_PORT": "1", "LRT_PROT": "2", "PATH": "x", "LRT_MAX_MODEL_LEN": "3"}
    assert unknown_variables(environment) == ["LRT_PROT"]
