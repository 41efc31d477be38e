"""Answers on the server's socket while the model loads: the process is live, everything else has to wait.

Neighbours: `__main__.py` runs it from binding the socket to handing it to the application; `api/errors.py` has the envelope.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from server.api.errors import dump_json, unavailable

logger = logging.getLogger(__name__)

MAX_DISCARDED = 2**20
"""Bytes of a request's body that are read before it is answered, so that its sender gets to read the answer."""


class _Handler(BaseHTTPRequestHandler):
    timeout = 5  # seconds for a client to finish its request

    def handle_one_request(self) -> None:
        """Whatever the method, one request a connection."""
        self.raw_requestline = self.rfile.readline(65537)
        if self.raw_requestline and self.parse_request():
            declared = self.headers.get("content-length", "")
            self.rfile.read(min(int(declared), MAX_DISCARDED) if declared.isdecimal() else 0)
            self._answer()
        self.close_connection = True

    def _answer(self) -> None:
        is_live = self.path.split("?")[0] == "/live" and self.command in ("GET", "HEAD")
        error = unavailable("The model is loading.", "loading")
        body = dump_json({"status": "ok"} if is_live else error.body)
        self.send_response(200 if is_live else error.status)
        for name, value in ({} if is_live else error.headers).items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a probe while loading is no news."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up while the model loads is no news either."""
        if not isinstance(sys.exc_info()[1], OSError):
            logger.exception("answering a request while loading failed")


@contextmanager
def answering(listener: socket.socket) -> Iterator[None]:
    """Within the block every request on the listening socket gets a 503, but for /live; the socket stays open afterwards."""
    server = _Server(listener.getsockname()[:2], _Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="lrt-loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
