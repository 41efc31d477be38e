"""One server process for all live tests: the bundled checkpoint in float32 on a free port, behind an API key. Nothing else is
reached: whatever tries the network at large fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[3]
PYTHON = os.environ.get("LRT_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
KEY = "sk-live"
os.environ.update({**ALONE, "OPENAI_API_KEY": KEY})  # before any client is imported
MODEL = "lrt-small"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a ready server listens. Whatever it says while the tests run is checked at the end."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [PYTHON, "-m", "server", "--port", "0", "--dtype", "float32", "--served-model-name", MODEL, "--check-invariants"]
    environment = {**os.environ, "LRT_API_KEY": KEY}
    with log.open("wb") as sink, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sink, stderr=sink) as process:
        try:
            url = _address(process, log)
            yield url
            health, metrics = httpx.get(url + "/health"), httpx.get(url + "/metrics", headers=AUTHORIZED).text
        finally:
            process.terminate()
            process.wait(60)
    assert health.status_code == 200
    assert re.search(r"^lrt:num_requests_running\{.*\} 0.0$", metrics, re.MULTILINE)
    assert process.returncode == 0
    assert not re.search(f"error|traceback|{KEY}", log.read_text(), re.IGNORECASE), log.read_text()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"listening on (http://\S+)", log.read_text())
        if found is not None and httpx.get(found[1] + "/ready").status_code == 200:
            return found[1]
        time.sleep(0.1)
    raise AssertionError(f"the server did not get ready:\n{log.read_text()}")


@pytest.fixture(scope="session")
def v1(url: str) -> str:
    """The base of the OpenAI routes."""
    return url + "/v1"


@pytest.fixture(scope="session")
def chat(v1: str) -> str:
    """The same, where there is a chat route."""
    status = httpx.post(v1 + "/chat/completions", json={}, headers=AUTHORIZED).status_code
    if status == 404:
        pytest.skip("this server has no chat route")
    return v1


class Direct:
    """What `lrt_core` computes, one token at a time, without a server: questions of `tests/clients/direct.py`, one process for
    all of them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, **questions: Any) -> dict[str, Any]:
        """Answers under the questions' names."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(questions), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "it has failed; the error stands above"
        answers: dict[str, Any] = json.loads(line)
        return answers


@pytest.fixture(scope="session")
def direct() -> Iterator[Direct]:
    """What the clients' answers are held against."""
    command = [PYTHON, "-m", "tests.clients.direct"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Direct(process)
        assert process.stdin is not None
        process.stdin.close()
    assert process.returncode == 0
