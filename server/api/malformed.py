"""What is no HTTP at all is refused in the error envelope too, by the protocol below the application.

Neighbours: `server/__main__.py` hands the protocol to uvicorn; `errors.py` has the envelope.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from server.api.errors import bad_request, dump_json

_BODY = dump_json(bad_request("The request is not valid HTTP.").body)
_REFUSAL = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
    % (len(_BODY), _BODY)
)


def _refuse(self: Any, _message: str) -> None:
    """End the connection, with an answer unless one is already on its way."""
    if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
        self.transport.write(_REFUSAL)
    self.transport.close()


def protocol(base: type[asyncio.Protocol] = AutoHTTPProtocol) -> type[asyncio.Protocol]:
    """Uvicorn's protocol (the one that it would choose itself), but for what it says to a client that speaks no HTTP."""
    return type("EnvelopedProtocol", (base,), {"send_400_response": _refuse})
