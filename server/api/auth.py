"""API keys: where the server has some, every request but the probes' must carry one, whatever the path.

Neighbours: `app.py` puts the guard before the routes, `errors.py` has the envelope, `openapi.py` tells of it,
`server/config.py` reads the keys.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ApiError, error_response

PROBES = frozenset({"/live", "/ready", "/health"})
"""Paths that need no key: whoever watches over the process has none, and they tell nothing else."""
FOR_BROWSERS = frozenset({"/docs", "/openapi.json"})
"""Paths that a browser opens by itself. It is asked for name and password there, and the password is the key."""


class ApiKeys:
    """The keys that are taken, as digests: the keys themselves are nowhere to be printed, and digests are of equal length, so
    that a comparison takes the same time whatever was sent."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode("utf-8")) for key in keys]

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._digests)

    def admit(self, authorization: str | None) -> bool:
        """Whether the header holds one of the keys: `Bearer KEY`, or `Basic` with the key for a password."""
        digest = _digest(_given(authorization or ""))
        return any([hmac.compare_digest(digest, known) for known in self._digests])  # all of them, also after a match


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _given(authorization: str) -> bytes:
    """The key in an Authorization header; empty, which no key is, where there is none."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip().encode("utf-8")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
        except (ValueError, binascii.Error):
            return b""
    return b""


class KeyGuard:
    """Middleware that answers 401 in the routes' place to a request without a key, before anything of it is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        if scope["type"] == "http" and scope["path"] not in PROBES:
            authorization = Headers(scope=scope).get("authorization")
            if not self._keys.admit(authorization):
                await error_response(_refusal(scope["path"], authorization is not None))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refusal(path: str, was_given: bool) -> ApiError:
    message = "The API key is wrong." if was_given else "An API key is needed."
    challenge = 'Bearer, Basic realm="lrt-server", charset="UTF-8"' if path in FOR_BROWSERS else "Bearer"
    return ApiError(
        401,
        f"{message} Send it in the header 'Authorization: Bearer KEY'.",
        code="invalid_api_key",
        headers={"www-authenticate": challenge},
    )
