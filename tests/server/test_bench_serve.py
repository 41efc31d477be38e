"""`lrt-bench serve` on real servers in processes of their own, and beside a fake one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.bench import limits, shapes
from server.bench.__main__ import main
from server.bench.errors import BenchError
from server.bench.http_client import Address, fetch
from server.bench.processes import engine_worker, own_server
from tests.server.fake_openai import Behaviour, fake_openai
from tests.server.test_bench import TINY_SHAPE
from tests.server.test_bench_load import free_port

SMALL = ("--prompt-len", "5", "--new-tokens", "4", "--timeout", "30")


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory to measure the limits on; one thread in all processes; d12 is tiny."""
    monkeypatch.setattr(limits, "READ_BYTES", 2**21)
    monkeypatch.setattr(shapes, "D12", TINY_SHAPE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(tmp_path: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    """The JSON of a run."""
    out = tmp_path / "figures.json"
    assert main(["serve", *arguments, *SMALL, "--json", str(out)]) == status
    data: dict[str, Any] = json.loads(out.read_text())
    return data


@pytest.mark.slow
def test_our_own_server_beside_the_engine_alone_and_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRT_PORT", "wrong")  # settings of servers that users run are not the bench's
    behaviour = Behaviour(refused=frozenset({"ignore_eos"}))
    with fake_openai(behaviour) as url:
        data = run(tmp_path, "--model", "d12", "--compare", url, "--clients", "2", "--rate", "50", "--requests", "4")
    assert [figure["name"] for figure in data["figures"]] == [
        "ours: 2 client(s)",
        "other: 2 client(s)",
        "ours over other: 2 client(s)",
        "engine alone: 2 client(s)",
        "ours over engine alone: 2 client(s)",
        "ours: 50 requests/s",
        "other: 50 requests/s",
        "ours over other: 50 requests/s",
    ]
    ours, other, over_other, alone, over_alone, *_ = data["figures"]
    assert ours["errors"] == other["errors"] == {} and ours["unfinished"] == 0
    assert (ours["prompt_tokens"], ours["tokens"]) == (5, 4), "every request is of the size asked for"
    assert (ours["model"], other["model"]) == ("bench", "fake")
    assert set(other["milliseconds"]["gaps"]) == {"p50", "p95", "p99"}  # ours may send so few tokens at once
    assert over_other["samples"] == pytest.approx([a / b for a, b in zip(ours["samples"], other["samples"], strict=True)])
    assert over_alone["samples"] == pytest.approx([a / b for a, b in zip(ours["samples"], alone["samples"], strict=True)])
    assert any("refuses ignore_eos" in note for note in data["notes"])
    assert any("shrinks the error" in note for note in data["notes"])
    prompts = [tuple(body["prompt"]) for body in behaviour.bodies]
    assert len(set(prompts)) >= len(prompts) - 3, "a prompt never comes twice, but for the probes"


@pytest.mark.slow
def test_a_server_that_starts_with_flags_and_stops_whatever_happens(checkpoint: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        own_server(checkpoint, ["--max-num-seqs", "3", "--dtype", "float32"]) as url,
    ):
        status, body = asyncio.run(fetch(Address.parse(url), "GET", "/v1/models"))
        assert status == 200 and json.loads(body)["data"][0]["id"] == "bench"
        raise KeyboardInterrupt
    with pytest.raises(Exception, match="connection refused"):
        asyncio.run(fetch(Address.parse(url), "GET", "/v1/models"))


@pytest.mark.slow
def test_processes_that_do_not_start(checkpoint: Path) -> None:
    with pytest.raises(BenchError, match=r"the server did not start: .*unrecognized arguments: --no-such-flag"):
        own_server(checkpoint, ["--no-such-flag"]).__enter__()
    (checkpoint / "config.json").unlink()
    with pytest.raises(BenchError, match=r"process failed: .*config\.json: file not found"):
        engine_worker(checkpoint, ["--max-num-seqs", "1", "--max-len", "8"]).__enter__()


def test_a_given_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_openai(Behaviour()) as url:
        data = run(tmp_path, "--url", url + "/v1/", "--clients", "1", "--no-stream", "--prompts", "text")
    (figure,) = data["figures"]
    assert figure["name"] == "server: 1 client(s)" and figure["stream"] is False and figure["model"] == "fake"
    assert figure["milliseconds"]["gaps"] is None and figure["milliseconds"]["latency"] is not None
    assert "whole answer" in capsys.readouterr().out


def test_two_given_servers_get_the_same_kind_of_prompt(tmp_path: Path) -> None:
    first = Behaviour()
    with fake_openai(first) as url, fake_openai(Behaviour(refuses_ids=True)) as other:
        data = run(tmp_path, "--url", url, "--compare", other, "--compare-model", "x", "--clients", "1")
    assert isinstance(first.bodies[0]["prompt"], list) and isinstance(first.bodies[-1]["prompt"], str)
    assert [figure["name"] for figure in data["figures"]] == [
        "ours: 1 client(s)",
        "other: 1 client(s)",
        "ours over other: 1 client(s)",
    ]
    assert data["figures"][1]["model"] == "x"


def test_servers_that_want_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with fake_openai(Behaviour(key="one")) as url, fake_openai(Behaviour(key="key-2")) as other:
        both = ("--url", url, "--compare", other, "--clients", "1")
        run(tmp_path, *both, "--api-key", "one", status=1)
        assert f"{other} lists no models (HTTP 401: who are you?)" in capsys.readouterr().err
        data = run(tmp_path, *both, "--api-key", "one", "--compare-api-key", "key-2")
        assert [figure["errors"] for figure in data["figures"][:2]] == [{}, {}]
        assert "key-2" not in json.dumps(data) + capsys.readouterr().out
        monkeypatch.setenv("OPENAI_API_KEY", "one")
        assert run(tmp_path, "--url", url, "--clients", "1")["figures"][0]["errors"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--api-key", "x"), "--api-key is for --url"),
        (("--url", "http://h", "--compare-api-key", "x"), "--compare-api-key is for --compare"),
        (("--url", "http://h", "--api-key", "a b"), "must be printable ASCII without spaces"),
    ],
)
def test_keys_for_nobody(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", *arguments])
    assert message in capsys.readouterr().err


def test_failures_stand_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_openai(Behaviour(status=503, good=9)) as url:
        data = run(tmp_path, "--url", url, "--clients", "4", "--requests", "4", status=1)
    assert data["figures"] == [], "not one whole repetition"
    with fake_openai(Behaviour(status=503, good=15)) as url:
        assert run(tmp_path, "--url", url, "--clients", "1", "--requests", "5")["figures"][0]["errors"] == {
            "HTTP 503: out of order": 2
        }
    printed = capsys.readouterr()
    assert "HTTP 503: out of order" in printed.err
    assert "failed 2 times: HTTP 503: out of order" in printed.out


def test_servers_that_cannot_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    run(tmp_path, "--url", nowhere, status=1)
    assert f"{nowhere}: connection refused" in capsys.readouterr().err
    with fake_openai(Behaviour()) as url:
        run(tmp_path, "--url", url, "--compare", nowhere, status=1)
    assert f"{nowhere}: connection refused" in capsys.readouterr().err


def test_a_slow_server_is_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_openai(Behaviour(delay=0.4)) as url:
        run(tmp_path, "--url", url, "--clients", "1", "--max-seconds", "0.5", status=1)
    assert "nothing was answered within 0.5 s" in capsys.readouterr().err


def test_a_prompt_beyond_the_context_is_told_before_anything_starts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(checkpoint), "--prompt-len", "60", "--new-tokens", "5"]) == 1
    assert "prompt and output are 65 tokens, the model's context is 64" in capsys.readouterr().err
