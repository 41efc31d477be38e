"""Tries grammars out in processes of their own, which a hostile one may hang or crash: neither a stack overflow in the library
nor minutes of computation that nothing could interrupt may reach the server.

A parent process loads the library once and forks a child for every grammar, so that one that ends its child costs the next one
nothing and several are tried at once. A child compiles for an alphabet of single bytes and takes some steps; a timer ends it
when that takes too long. All end with the server. `python -m server.engine.grammar_probe` is the parent; it imports no torch.
Neighbours: `grammars.py` owns a `Probe`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from typing import NoReturn

from lrt_core.grammar import GrammarCompiler, GrammarError, GrammarSource
from lrt_core.tokenizer import Tokenizer

MAX_SECONDS = 0.15
"""Of computation for one grammar, which takes milliseconds as a rule."""
MAX_SILENCE = 60
"""Seconds after which a process that does not compute either is given up."""
MAX_MEMORY = 2**30
"""Bytes of address space of a process."""
STACK_SIZE = 2**21
"""Bytes, a quarter of what a server's thread has: what fits here will not overflow there."""
NUM_STEPS = 32
NICENESS = 10
"""Of the children: the engine's thread, which they compete with, goes first."""


class Probe:
    """The parent process, started when first needed and again should it have ended. Any threads may use it at once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()

    def check(self, source: GrammarSource) -> None:
        """Raise GrammarError unless the grammar is valid and cheap; RuntimeError when there is no process to be had."""
        ours, theirs = socket.socketpair()
        with ours, ours.makefile("rb") as answers:
            with theirs:
                process = self._hand_over(theirs)
            answer = b""
            with contextlib.suppress(ConnectionError):  # nobody is there, and nobody answers
                ours.sendall(json.dumps([source.kind, source.text]).encode() + b"\n")
                answer = answers.readline()
        if not answer:
            raise RuntimeError(f"the process that tries grammars out has ended: exit status {process.wait(MAX_SILENCE)}")
        error, code = json.loads(answer)
        if code in (-signal.SIGKILL, -signal.SIGALRM):
            raise RuntimeError("the process that tried a grammar out was killed")
        if code != 0:
            raise GrammarError("takes too long to compile" if code == -signal.SIGPROF else "is nested too deeply or too large")
        if error is not None:
            raise GrammarError(error)

    def close(self) -> None:
        """End the process; children end by themselves, within the time that they have."""
        with self._lock:
            self._end()

    def _hand_over(self, connection: socket.socket) -> subprocess.Popen[bytes]:
        """To the process that is returned, which may be gone before it has seen the connection."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._end()
            if self._control is None:
                self._start()
            assert self._control is not None and self._process is not None
            with contextlib.suppress(ConnectionError):
                socket.send_fds(self._control, [b"."], [connection.fileno()])
            return self._process

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name],
                env=environment,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what a crash says there is for the library's authors
            )

    def _end(self) -> None:
        if self._process is not None and self._control is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
            self._process = self._control = None


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


class Parent:
    """Forks a child for every connection that comes over `control`, until that ends. A child answers its connection's line of
    JSON, [kind, text], with a line [error or null, 0]; where it cannot, its parent says [null, exit status]."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._compiler = byte_compiler()
        self._children: dict[int, socket.socket] = {}

    def serve(self) -> None:
        """Until nobody is left at the other end."""
        signal.signal(signal.SIGCHLD, lambda *_: self._reap())
        while True:
            _, [*handles], _, _ = socket.recv_fds(self._control, 1, 1)
            if not handles:
                return
            # A child that ends before it is known would not be missed.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            connection = socket.socket(fileno=handles[0])
            pid = os.fork()
            if pid == 0:
                self._be_child(connection)
            self._children[pid] = connection
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            with self._children.pop(pid) as connection, contextlib.suppress(ConnectionError):
                if code != 0:
                    connection.sendall(json.dumps([None, code]).encode() + b"\n")

    def _be_child(self, connection: socket.socket) -> NoReturn:
        """Answer and be gone, whatever happens: what follows a fork is the parent's business."""
        try:
            self._control.close()
            for other in self._children.values():
                other.close()
            os.nice(NICENESS)
            self._answer(connection)
        finally:
            os._exit(1)  # an answer ends it before

    def _answer(self, connection: socket.socket) -> NoReturn:
        with connection.makefile("rb") as lines:
            kind, text = json.loads(lines.readline())
        signal.alarm(MAX_SILENCE)
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        error = try_out(self._compiler, GrammarSource(kind, text))
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(json.dumps([error, 0]).encode() + b"\n")
        os._exit(0)


def main() -> None:
    """Serve standard input, a socket. A child has a small stack, and whatever it is doing, a timer's signal ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is for the server
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_SIZE, STACK_SIZE))  # met as the stack grows
    Parent(socket.socket(fileno=sys.stdin.fileno())).serve()


if __name__ == "__main__":
    main()
