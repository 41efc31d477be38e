"""The one error envelope: what every refusal and failure looks like, in responses and inside streams.

Neighbours: every module of `server/api` raises `ApiError`; `app.py` installs the handlers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from server.engine.request import AdmissionError, NotFiniteError, PromptTooLongError, RequestError

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
RETRY_AFTER = {"retry-after": "1"}
"""Seconds after which a client refused for load may try again."""


class ApiError(Exception):
    """A response other than 200. param: the field at fault; code: a machine-readable word, or None."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, *, param: str | None = None, code: str = INVALID_REQUEST) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str) -> ApiError:
    """A 503 that invites another try."""
    return ApiError(503, message, kind="service_unavailable_error", code=code, headers=RETRY_AFTER)


def internal_error() -> ApiError:
    """A 500 that says nothing about the inside; the log has the rest."""
    return ApiError(500, "The server failed to process this request.", kind="server_error", code="internal_error")


def from_exception(error: Exception) -> ApiError:
    """What a client is told about `error`; anything unexpected is logged and becomes a bare 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return bad_request(str(error), param="prompt", code="context_length_exceeded")
    if isinstance(error, RequestError):
        return bad_request(str(error), param=error.param)
    if isinstance(error, NotFiniteError):
        return ApiError(500, f"Generation failed: {error}.", kind="server_error", code="not_finite")
    if isinstance(error, AdmissionError) and error.reason == "queue_full":
        return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=RETRY_AFTER)
    if isinstance(error, AdmissionError) and error.reason == "draining":
        return unavailable("The server is shutting down and takes no new requests.", "draining")
    logger.error("request failed", exc_info=error)
    return internal_error()


def dump_json(content: Any) -> bytes:
    """Compact UTF-8 JSON; refuses NaN, replaces lone surrogates. It is one line to every client."""
    return escape_line_ends(_JSON.encode(content)).encode("utf-8", "replace")


def escape_line_ends(text: str) -> str:
    """JSON with those characters escaped that JSON may hold as they are and some clients end a line of a stream at."""
    if text.isascii():
        return text
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(dump_json(content), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """The envelope of `error`."""
    return json_response(error.body, error.status, error.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make every failure of `app` answer in the envelope: ours, the router's 404 and 405, and the unforeseen."""

    async def handle_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        message = f"{error.detail}: {request.method} {request.url.path[:200]}"
        return error_response(ApiError(error.status_code, message, headers=headers))

    async def handle_any(_request: Request, error: Exception) -> Response:
        return error_response(from_exception(error))

    async def handle_unforeseen(_request: Request, _error: Exception) -> Response:
        return error_response(internal_error())  # the framework logs the traceback

    app.add_exception_handler(HTTPException, handle_http)
    for kind in (ApiError, RequestError, AdmissionError):
        app.add_exception_handler(kind, handle_any)
    app.add_exception_handler(Exception, handle_unforeseen)
