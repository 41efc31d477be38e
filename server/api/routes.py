"""The routes beside completions: what is served, whether it is well, and how much it does.

Neighbours: `app.py` installs them; `service.py` holds what they tell.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from server.api.errors import json_response, unavailable
from server.api.service import Service

PROBE_METHODS = ["GET", "HEAD"]
STALLED_SECONDS = 120.0
"""An engine with work that has not finished a step for this long is taken for stuck."""


def add_models(app: FastAPI, service: Service) -> None:
    """What is served."""

    def describe(name: str) -> dict[str, Any]:
        recurrence = service.engine.model_config.recurrence
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "lrt-server",
            "max_model_len": service.engine.config.max_model_len,
            "recurrence": recurrence and {"variant": recurrence.variant, "source_layer": recurrence.source_layer},
        }

    @app.get("/v1/models")
    async def list_models() -> Response:
        """Every served name."""
        return json_response({"object": "list", "data": [describe(name) for name in service.model_names]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        """One served name."""
        service.check_model(name)
        return json_response(describe(name))


def add_probes(app: FastAPI, service: Service) -> None:
    """Whether the process lives, is ready and gets on."""
    engine = service.engine

    @app.api_route("/live", methods=PROBE_METHODS)
    async def live(_request: Request) -> Response:
        """The process answers."""
        return json_response({"status": "ok"})

    @app.api_route("/ready", methods=PROBE_METHODS)
    async def ready(_request: Request) -> Response:
        """New requests are taken."""
        if engine.error is not None or not engine.is_ready:
            raise unavailable("The server is not ready.", "draining" if engine.is_draining else "not_ready")
        return json_response({"status": "ok"})

    @app.api_route("/health", methods=PROBE_METHODS)
    async def health(_request: Request) -> Response:
        """The engine lives and, if it has work, gets on with it."""
        if engine.error is not None:
            raise unavailable("The engine has failed.", "engine_dead")
        age = engine.last_step_age
        if age > STALLED_SECONDS:
            raise unavailable(f"The engine has not finished a step for {age:.0f} seconds.", "engine_stalled")
        return json_response({"status": "ok", "last_step_age_seconds": round(age, 3)})


def add_observability(app: FastAPI, service: Service) -> None:
    """Numbers for machines."""
    versions = {
        "version": package_version("lrt-server"),
        "torch": package_version("torch"),
        "python": platform.python_version(),
    }

    @app.get("/version")
    async def get_version() -> Response:
        """Versions of what answers."""
        return json_response(versions)

    @app.get("/load")
    async def get_load() -> Response:
        """Requests in flight."""
        return json_response({"server_load": service.engine.num_in_flight})

    @app.get("/metrics")
    async def get_metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.exposition(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


def package_version(package: str) -> str:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # run from a source tree
