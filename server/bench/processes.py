"""The other processes of a run: the server under test, the load's clients, an engine without a server. No torch.

Each is started by this program and ended by it, whatever happens. Ctrl-C reaches this program alone.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.bench.errors import BenchError
from server.bench.load import Job, Outcome

START_SECONDS = 300.0
"""How long a model may load."""
STOP_SECONDS = 10.0
SERVED_NAME = "bench"


@contextmanager
def own_server(checkpoint: Path, arguments: Sequence[str]) -> Iterator[str]:
    """Our server on a free port, with further flags; yields its URL. Raises BenchError when it does not start."""
    command = ["-m", "server", str(checkpoint), "--port", "0", "--served-model-name", SERVED_NAME, *arguments]
    with _process(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        lines = _Lines(process.stderr)
        said: deque[str] = deque(maxlen=20)
        while (line := lines.next(START_SECONDS)) is not None:
            said.append(line)
            if found := re.search(r"; listening on (http://\S+)", line):
                yield found.group(1)
                return
        raise BenchError("the server did not start: " + " ".join(said).strip())


@contextmanager
def engine_worker(checkpoint: Path, arguments: Sequence[str]) -> Iterator[Worker]:
    """An engine in a process of its own, ready. Raises BenchError when it does not start."""
    command = ["-m", "server.bench.worker", str(checkpoint), *arguments]
    with _process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        worker = Worker(process)
        worker.receive(START_SECONDS)
        yield worker


class Worker:
    """A process that answers each line of JSON with one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._stdin = process.stdin
        self._answers, self._errors = _Lines(process.stdout), _Lines(process.stderr)

    def ask(self, question: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Raises BenchError when there is no answer in time."""
        try:
            self._stdin.write(json.dumps(question) + "\n")
            self._stdin.flush()
        except OSError:
            raise self._failure() from None
        return self.receive(timeout)

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next answer. Raises BenchError."""
        line = self._answers.next(timeout)
        if line is None:
            raise self._failure()
        data: dict[str, Any] = json.loads(line)
        return data

    def _failure(self) -> BenchError:
        said = self._errors.rest()
        return BenchError("the engine's process " + (f"failed: {said[-1].strip()}" if said else "gives no answer"))


def run_load(job: Job) -> Outcome:
    """The job in a process of its own. Raises BenchError when that process fails."""
    with _process(
        ["-m", "server.bench.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        limit = job.time_limit + job.request_timeout + STOP_SECONDS
        try:
            out, err = process.communicate(json.dumps(asdict(job)), timeout=limit)
        except subprocess.TimeoutExpired:
            raise BenchError(f"the load's process did not end within {limit:g} s") from None
        if process.returncode != 0:
            raise BenchError(f"the load's process failed: {err.strip().splitlines()[-1:]}")
        return Outcome(**json.loads(out))


class _Lines:
    """Lines of a pipe, read by a thread, so that a full pipe never holds its writer up; the last ones are kept."""

    def __init__(self, pipe: Any) -> None:
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: Any) -> None:
        for line in pipe:
            self._queue.put(line)
        self._queue.put(None)

    def next(self, timeout: float) -> str | None:
        """The next line; None at the end or when none comes in time."""
        try:
            return self._queue.get(timeout=timeout)
        except queue.Empty:
            return None

    def rest(self) -> list[str]:
        """What else there is, once the writer has ended."""
        self._thread.join(STOP_SECONDS)
        lines = []
        while not self._queue.empty():
            lines.append(self._queue.get())
        return [line for line in lines if line is not None]


@contextmanager
def _process(arguments: Sequence[str], **pipes: int) -> Iterator[subprocess.Popen[str]]:
    """A Python process in a session of its own; gone when the block ends. LRT_ variables, which are settings of servers, stay
    out of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LRT_")}
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None and not pipe.closed:
                _close(pipe)


def _close(pipe: Any) -> None:
    """Close a pipe whose other end is gone: what is still buffered has nowhere to go."""
    try:
        pipe.close()
    except BrokenPipeError:
        return
