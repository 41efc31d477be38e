"""`lrt-server` as a process: what it says at start, a real model's answers, real signals, exit codes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow


@contextmanager
def server(checkpoint: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A process, the line it said at start, and its URL."""
    command = [
        sys.executable,
        "-m",
        "server",
        str(checkpoint),
        "--port",
        "0",
        "--dtype",
        "float32",
        "--check-invariants",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LRT_SERVED_MODEL_NAME": "tiny"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        if "--max-model-len" in arguments:
            assert line.startswith("WARNING: --max-model-len ") and "beyond the trained 64 tokens" in line
            line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, line + process.stderr.read()
        yield process, line, found.group()
    finally:
        process.kill()
        process.communicate()


def test_a_process_from_start_to_a_clean_end(checkpoint: Path) -> None:
    with server(checkpoint, "--max-model-len", "2000", "--kv-cache-memory", "8M", "--stream-interval", "100") as (
        process,
        line,
        url,
    ):
        assert re.fullmatch(
            rf"INFO: serving tiny \({re.escape(str(checkpoint))}\): recurrence layerwise, source layer 2; float32, "
            r"(native kernels \(\w+\)|torch kernels), 1 thread; cache of \d+ tokens; listening on http://127\.0\.0\.1:\d+\n",
            line,
        )
        body = {"model": "tiny", "prompt": "def f", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        first = httpx.post(url + "/v1/completions", json=body, timeout=30).json()
        assert first["usage"]["completion_tokens"] == 8
        assert re.fullmatch(r"[0-9a-f]{8}-float32-window", first["system_fingerprint"])
        assert 'lrt:generation_tokens_total{engine="0",model_name="tiny"} 8.0' in httpx.get(url + "/metrics").text

        request = {**body, "max_tokens": 300, "stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", url + "/v1/completions", json=request, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert len(rest) == 3 + 2, "a hundred tokens an event after the first, usage and end"
        assert '"completion_tokens":300' in rest[-2] and rest[-1] == "data: [DONE]"
        assert process.wait(20) == 0


def test_second_signal_ends_it_at_once(checkpoint: Path) -> None:
    with server(checkpoint, "--max-model-len", "1000000", "--kv-cache-memory", "1G") as (process, _, url):
        body = {"model": "tiny", "prompt": "a", "max_tokens": 900_000, "ignore_eos": True, "stream": True}
        started = threading.Event()

        def read() -> None:
            with (
                pytest.raises(httpx.TransportError),
                httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response,
            ):
                for _ in response.iter_lines():
                    started.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert started.wait(30)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "finishing 1 running requests" in process.stderr.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 0
        reader.join(10)
        assert not reader.is_alive()


@contextmanager
def altered(checkpoint: Path, change: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server of this program with a change made first, as source text; yields process, start line and URL."""
    script = f"import sys\n{change}\nfrom server.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
    command = [sys.executable, "-c", script, str(checkpoint), "--port", "0", "--served-model-name", "tiny"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            yield process, line, line.split()[-1]
        finally:
            process.kill()


def test_dead_engine_ends_it_with_status_1(checkpoint: Path) -> None:
    change = (
        "def explode(*_): raise RuntimeError('secret')\nimport server.engine.model_runner as r\nr.ModelRunner.execute = explode"
    )
    with altered(checkpoint, change) as (process, _, url):
        response = httpx.post(url + "/v1/completions", json={"model": "tiny", "prompt": "a"}, timeout=30)
        assert response.status_code == 500 and "secret" not in response.text
        assert httpx.get(url + "/health").status_code == 503
        assert process.wait(20) == 1


def test_without_native_kernels_torch_serves_and_the_start_says_so(checkpoint: Path) -> None:
    """As where the package's build found no compiler."""
    with altered(checkpoint, "import lrt_core.kernels as k\nk._library = None") as (process, line, url):
        assert "; float32, torch kernels, 1 thread; " in line
        body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "ignore_eos": True}
        response = httpx.post(url + "/v1/completions", json=body, timeout=30)
        assert (response.status_code, response.json()["usage"]["completion_tokens"]) == (200, 3)
        process.terminate()
        assert process.wait(20) == 0


def test_a_signal_while_loading_ends_it_cleanly(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = (
        "import sys, time, server.__main__ as m\n"
        "def linger(*_): time.sleep(60)\n"
        "m._load = linger\n"
        "sys.exit(m.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, str(checkpoint), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 30
            while (status := status_of(f"http://127.0.0.1:{port}/ready")) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert status == 503
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
            assert process.stderr is not None and process.stderr.read() == ""
        finally:
            process.kill()


def status_of(url: str) -> int | None:
    """The status of an answer, None where nobody listens yet."""
    try:
        return httpx.get(url).status_code
    except httpx.TransportError:
        return None
