"""What the routes share: the engine, the names it serves under, and the limits of a request.

Neighbours: `server/__main__.py` makes one, `app.py` hands it to the routes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lrt_core.chat import ChatTemplate
from server.api.auth import ApiKeys
from server.api.errors import ApiError
from server.api.values import MAX_LOGPROBS
from server.engine.async_engine import AsyncEngine

NO_KEYS = ApiKeys(())


@dataclass(frozen=True)
class Service:
    """model_names: what a request's `model` may say, the first being the one reported. fingerprint: of what answers
    (weights, dtype, prefill mode). created: Unix seconds. exposition: the metrics page. max_body_size: bytes.
    lenient: drop unknown fields with a warning header instead of refusing them. chat: None for a model without a template.
    max_logprobs: bound of every count of logprobs. keys: of which requests must carry one, if there are any.
    stream_interval: tokens of a choice in one event of a stream."""

    engine: AsyncEngine
    model_names: tuple[str, ...]
    fingerprint: str
    created: int
    exposition: Callable[[], bytes]
    max_body_size: int
    lenient: bool = False
    chat: ChatTemplate | None = None
    max_logprobs: int = MAX_LOGPROBS
    keys: ApiKeys = NO_KEYS
    stream_interval: int = 1

    def check_model(self, name: str) -> None:
        """Raise ApiError (404) unless `name` is served."""
        if name not in self.model_names:
            served = ", ".join(self.model_names)
            message = f"The model {name[:100]!r} does not exist; this server has: {served}."
            raise ApiError(404, message, param="model", code="model_not_found")
