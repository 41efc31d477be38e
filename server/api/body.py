"""Reads a JSON object from a request: bounded, strict about what JSON is, every refusal an `ApiError`.

Neighbours: `completions.py` reads its body here; `schemas.py` judges the fields.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from fastapi import Request

from server.api.errors import ApiError, bad_request


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's body as a JSON object. Raises ApiError: 413 beyond max_bytes (before reading it all), else 400."""
    return parse_object(await _read(request, max_bytes))


async def _read(request: Request, max_bytes: int) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise bad_request(f"The request body must not be encoded; its content-encoding is {encoding[:40]!r}.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, f"The request body is larger than the {max_bytes} bytes this server accepts.", code="request_too_large"
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, no NaN or Infinity, no key twice. Raises ApiError (400)."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"The request body is not UTF-8: invalid byte at position {error.start}.") from None
    try:
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise bad_request("The request body is nested too deeply.") from None
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):  # of digits, which Python goes on to tell how to raise
            raise bad_request("The request body holds a number of too many digits.") from None
        raise bad_request(f"The request body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(data, dict):
        raise bad_request("The request body must be a JSON object.")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:100]!r} appears twice")
            seen.add(key)
    return data
