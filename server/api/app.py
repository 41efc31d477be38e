"""Puts the HTTP application together: API keys, routes, error envelope, and the engine's start and stop with the application's.

Neighbours: `server/__main__.py` runs it under uvicorn; the tests run it in-process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from server.api.auth import KeyGuard
from server.api.chat import add_chat
from server.api.completions import add_completions
from server.api.errors import install_error_handlers
from server.api.openapi import add_documents
from server.api.routes import add_models, add_observability, add_probes
from server.api.service import Service
from server.api.tokenization import add_tokenization


def create_app(service: Service) -> FastAPI:
    """The application around one engine, which it starts, and stops without draining: whoever shuts down gracefully
    drains the engine before."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.engine.start()
        try:
            yield
        finally:
            await service.engine.stop(drain=False)

    app = FastAPI(title="lrt-server", lifespan=lifespan, redirect_slashes=False, openapi_url=None)
    install_error_handlers(app)
    app.add_exception_handler(ClientDisconnect, _forget)
    if service.keys:
        app.add_middleware(KeyGuard, keys=service.keys)
    add_completions(app, service)
    add_chat(app, service)
    add_tokenization(app, service)
    add_models(app, service)
    add_probes(app, service)
    add_observability(app, service)
    add_documents(app, service)
    return app


async def _forget(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # for the log: the client is gone
