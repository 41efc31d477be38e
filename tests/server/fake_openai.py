"""A server that speaks OpenAI's completions as far as a benchmark needs, and misbehaves as a test wishes."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """refused: fields that are answered with a 400; status: of every completion but the first `good` ones; delay: seconds
    before each token; breaks: the connection ends in the middle of every stream; closes: it ends after every answer,
    unannounced; bodies: what was asked for; key: what every request must carry, empty for none."""

    refused: frozenset[str] = frozenset()
    refuses_ids: bool = False
    status: int = 200
    good: int = 0
    delay: float = 0.0
    breaks: bool = False
    closes: bool = False
    garbage: bool = False
    models: tuple[str, ...] = ("fake",)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    key: str = ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    behaviour: Behaviour

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news; anything else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        if self._has_key():
            self._answer(200, {"data": [{"id": name} for name in self.server.behaviour.models]})

    def _has_key(self) -> bool:
        """Whether the request carries the key; it is answered where it does not."""
        key = self.server.behaviour.key
        known = not key or self.headers["authorization"] == f"Bearer {key}"
        if not known:
            self._answer(401, {"error": {"message": "who are you?"}})
        return known

    def do_POST(self) -> None:
        behaviour = self.server.behaviour
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._has_key():
            return
        behaviour.bodies.append(body)
        self.close_connection = behaviour.closes
        refused = next((name for name in body if name in behaviour.refused), None)
        if refused is not None or (behaviour.refuses_ids and not isinstance(body["prompt"], str)):
            self._answer(400, {"error": {"message": f"no {refused or 'ids'} here"}})
        elif behaviour.status != 200 and len(behaviour.bodies) > behaviour.good:
            self._answer(behaviour.status, {"error": {"message": "out of order"}})
        elif behaviour.garbage:
            self._answer(200, "garbage")
        elif body.get("stream"):
            self._stream(body)
        else:
            time.sleep(behaviour.delay * body["max_tokens"])
            self._answer(200, {"choices": [{"text": "x"}], "usage": self._usage(body)})

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(body["max_tokens"]):
            time.sleep(self.server.behaviour.delay)
            if self.server.behaviour.breaks and number == 1:
                self.close_connection = True
                return
            self._chunk(f"data: {json.dumps({'choices': [{'text': 'x'}]})}\n\n")
        if "stream_options" in body:
            self._chunk(f"data: {json.dumps({'choices': [], 'usage': self._usage(body)})}\r\n\r\n")
        self._chunk("data: [DONE]\n\n")
        self._chunk("")

    def _chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

    def _usage(self, body: dict[str, Any]) -> dict[str, int]:
        return {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}

    def _answer(self, status: int, content: object) -> None:
        data = json.dumps(content).encode() if not isinstance(content, str) else content.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def fake_openai(behaviour: Behaviour) -> Iterator[str]:
    """Yields the URL."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.behaviour = behaviour
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
