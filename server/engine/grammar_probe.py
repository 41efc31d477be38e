"""Tries grammars out in a process of its own, which a hostile one may hang or crash: neither a stack overflow in the library
nor minutes of computation that nothing could interrupt may reach the server.

The process compiles for an alphabet of single bytes and takes some steps. It ends itself when a grammar takes too long, and
with the server. `python -m server.engine.grammar_probe` is that process; it imports no torch. Neighbours: `grammars.py` owns a
`Probe`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading

from lrt_core.grammar import GrammarCompiler, GrammarError, GrammarSource
from lrt_core.tokenizer import Tokenizer

MAX_SECONDS = 0.3
"""Of computation for one grammar, which takes milliseconds as a rule."""
MAX_MEMORY = 2**30
"""Bytes of address space of the process."""
STACK_SIZE = 2**21
"""Bytes, a quarter of what a server's thread has: what fits here will not overflow there."""
NUM_STEPS = 32


class Probe:
    """The process, started when first needed and again after a grammar that ended it. For one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def check(self, source: GrammarSource) -> None:
        """Raise GrammarError unless the grammar is valid and cheap; RuntimeError when there is no process to be had."""
        process = self._ready()
        assert process.stdin is not None and process.stdout is not None
        answer = b""
        with contextlib.suppress(BrokenPipeError):  # it died, and gives no answer
            process.stdin.write(json.dumps([source.kind, source.text]).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer:
            code = self._end()
            self._start()  # in the background, for the next
            if code == -signal.SIGKILL:
                raise RuntimeError("the process that tries grammars out was killed")
            raise GrammarError("takes too long to compile" if code == -signal.SIGPROF else "is nested too deeply or too large")
        error = json.loads(answer)
        if error is not None:
            raise GrammarError(error)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._end()

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
        self._is_ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a crash says there is for the library's authors
        )

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdout is not None
        process = self._process
        if not self._is_ready and not self._process.stdout.readline():
            raise RuntimeError(f"the process that tries grammars out does not start: exit status {self._end()}")
        self._is_ready = True
        return process

    def _end(self) -> int:
        """Wait for the process to be gone; returns its status."""
        process, self._process = self._process, None
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()


def try_out(compiler: GrammarCompiler, source: GrammarSource) -> str | None:
    """Compile and take some steps at random; returns what is wrong. A step that goes too far is no fault: a sample may not go
    there, and if it does, it alone ends."""
    try:
        state = compiler.compile(source).start()
    except GrammarError as error:
        return str(error)
    choose = random.Random(0).choice
    for _ in range(NUM_STEPS):
        ids = state.permitted()[:256].nonzero()[0].tolist()
        if not ids or state.error is not None:
            break
        state.accept(choose(ids))
    return None


def byte_compiler() -> GrammarCompiler:
    """A compiler for single bytes and one end-of-sequence id."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return GrammarCompiler(Tokenizer(r"(?s).", ranks, {"<|end|>": 256}, None, ["<|end|>"], False, None), [256])


def serve() -> None:
    """A line of JSON [kind, text] in, a line with null or an error out, until the input ends. First of all a line says so."""
    compiler = byte_compiler()
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        kind, text = json.loads(line)
        error = try_out(compiler, GrammarSource(kind, text))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(error), flush=True)


def main() -> None:
    """Serve in a thread with a small stack; the signal of a timer ends the process whatever the thread is doing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is for the server
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_SIZE)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
