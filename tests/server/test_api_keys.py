"""API keys: who is let in, who is told what, and that no key is ever shown."""

from __future__ import annotations

import base64
import logging
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from server.__main__ import main
from server.api.auth import PROBES, ApiKeys
from server.api.openapi import make_document
from server.config import parse_config, read_api_keys
from tests.server.fakes import NAME, FakeEngine, assert_envelope, call, make_app

KEY, OTHER = "sk-one/2+3==", "sk-other"
APP = make_app(FakeEngine(), keys=ApiKeys([KEY, OTHER]))
ROUTES = [(route.path, method) for route in APP.routes if isinstance(route, APIRoute) for method in sorted(route.methods)]


def ask(path: str, method: str = "GET", **headers: str) -> httpx.Response:
    return call(APP, method, path.replace("{name:path}", NAME), headers=headers)


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(("path", "method"), [*ROUTES, ("/nowhere", "GET"), ("/v1/completions", "GET"), ("/health/", "GET")])
def test_every_route_but_the_probes_wants_a_key(path: str, method: str) -> None:
    if path in PROBES:
        assert ask(path, method).status_code == 200
        return
    refused = ask(path, method)
    if method != "HEAD":
        assert "is needed" in assert_envelope(refused, 401, "invalid_api_key")
    assert refused.headers["www-authenticate"].startswith("Bearer")
    assert ask(path, method, authorization=f"Bearer {KEY}").status_code != 401


@pytest.mark.parametrize(
    "given",
    [f"Bearer {KEY}", f"bearer {OTHER}", f"Bearer  {KEY} ", basic(f"anyone:{KEY}"), basic(f":{OTHER}"), basic(f"a:{KEY}")],
)
def test_any_of_the_keys_opens(given: str) -> None:
    assert ask("/v1/models", authorization=given).status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Token {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}",
        "Bearer \xe9",
        f"Bearer {KEY},{OTHER}",
        *(basic(KEY), basic(f"{KEY}:"), basic(f"{KEY}:{KEY}x"), basic("a:"), "Basic ====", "Basic \xe9"),
    ],
)
def test_anything_else_does_not(given: str) -> None:
    refused = call(APP, "GET", "/v1/models", headers=[(b"authorization", given.encode("latin-1"))])
    told = assert_envelope(refused, 401, "invalid_api_key")
    assert "is wrong" in told and KEY not in told and "basic" not in refused.headers["www-authenticate"].lower()


def test_a_browser_is_asked_for_a_password() -> None:
    for path in ("/docs", "/openapi.json"):
        assert 'Basic realm="lrt-server"' in ask(path).headers["www-authenticate"]
        assert ask(path, authorization=basic(f"me:{KEY}")).status_code == 200


def test_nothing_of_a_refused_request_is_read_or_run() -> None:
    engine = FakeEngine()
    app = make_app(engine, keys=ApiKeys([KEY]))
    assert_envelope(call(app, "POST", "/v1/completions", content=b"{"), 401, "invalid_api_key")
    body: dict[str, Any] = {"prompt": "hi"}
    assert call(app, "POST", "/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    assert len(engine.requests) == 1


def test_without_keys_any_header_passes() -> None:
    assert not ApiKeys(())
    assert call(make_app(FakeEngine()), "GET", "/v1/models", headers={"authorization": "Bearer unused"}).status_code == 200


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, with equal lengths, whichever matches."""
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("server.api.auth.hmac.compare_digest", compare)
    for given in (KEY, OTHER, "x", ""):
        ApiKeys([KEY, OTHER]).admit(f"Bearer {given}")
    assert compared == [(32, 32)] * 8


def test_the_document_says_where_a_key_is_needed() -> None:
    document = ask("/openapi.json", authorization=f"Bearer {KEY}").json()
    schemes = document["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer" and document["security"] == [{name: []} for name in schemes]
    for path, methods in document["paths"].items():
        for says in methods.values():
            assert ("401" in says["responses"]) == (path not in PROBES) == ("security" not in says)
    open_to_all = make_document(NAME)
    assert "security" not in open_to_all and "securitySchemes" not in open_to_all["components"]


# Where keys come from.


def test_keys_come_from_flags_the_environment_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n  {KEY}  \nb,c\n")
    assert parse_config(["--api-key", "a,b", "--api-key", "c"], {"LRT_API_KEY": "z"}).api_key == ("a", "b", "c")
    assert parse_config([], {"LRT_API_KEY": "y, z"}).api_key == ("y", "z")
    assert read_api_keys(parse_config([], {"LRT_API_KEY": ""})) == ()
    both = parse_config(["--api-key-file", str(file)], {"LRT_API_KEY": "z"})
    assert read_api_keys(both) == ("z", KEY, "b", "c")


@pytest.mark.parametrize("text", ["", " ", "secret\xe9", "secret,", "two secrets", "secret\x7f"])
def test_a_wrong_key_is_told_without_being_shown(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse_config([f"--api-key={text}"], {})
    assert exit.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "visible ASCII" in told and "secret" not in told
    if text.strip():
        file = tmp_path / "keys"
        file.write_text(f"good\n{text}\n")
        with pytest.raises(ValueError, match="line 2: a key is one or more visible ASCII") as error:
            read_api_keys(parse_config(["--api-key-file", str(file)], {}))
        assert "secret" not in str(error.value)


def test_a_file_without_keys_starts_no_open_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, message in (("empty", "holds no key"), ("missing", "No such file"), ("binary", "not UTF-8"), ("", "directory")):
        assert main(["--port", "0", "--api-key-file", str(tmp_path / name)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("lrt-server: error: --api-key-file ") and message in told and told.count("\n") == 1


def test_no_process_inherits_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRT_API_KEY", KEY)
    assert main(["--port", "0", str(tmp_path / "nowhere")]) == 1
    assert "LRT_API_KEY" not in os.environ


def test_keys_are_in_no_log_and_no_representation(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert ask("/v1/models", authorization=f"Bearer {KEY}").status_code == 200
        assert ask("/v1/models", authorization=f"Bearer {KEY}x").status_code == 401
    assert KEY not in caplog.text
    assert KEY not in repr(parse_config(["--api-key", KEY], {}))
    assert KEY not in repr(vars(ApiKeys([KEY])))
