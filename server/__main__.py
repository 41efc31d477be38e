"""`lrt-server`: reads the settings, loads the engine, serves until told to stop.

The first SIGINT or SIGTERM drains: running requests finish, new ones get 503 on a socket that stays open; the second one ends
the process at once. A dead engine ends it with status 1. Neighbours: `config.py`, `metrics.py`, `api/app.py`,
`engine/loader.py`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from server.config import ServerConfig, parse_config, read_api_keys, unknown_variables, variable

if TYPE_CHECKING:
    from server.api.service import Service
    from server.engine.async_engine import AsyncEngine
    from server.engine.loader import LoadOptions

logger = logging.getLogger("lrt-server")

BUNDLED_NAME = "lrt-small"
"""What the bundled checkpoint is served as."""
WATCH_SECONDS = 0.2
FAILURE_SECONDS = 2.0
"""How long a server with a dead engine still answers, so that clients and probes learn of it."""
FLUSH_SECONDS = 5
"""How long finished responses may take to reach their clients after the drain."""


class StartError(Exception):
    """The server cannot start; the message is for the user. status: of the process."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Server(uvicorn.Server):
    """Uvicorn with our way to stop: the engine drains first, while the socket stays open."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, settings: ServerConfig, greeting: str) -> None:
        super().__init__(config)
        self._engine, self._settings, self._greeting = engine, settings, greeting
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, then greet and begin to watch the engine."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._tasks.append(self._loop.create_task(self._watch()))
        print(f"INFO: {self._greeting}", file=sys.stderr, flush=True)
        if self._is_stopping:
            self._begin_drain()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain; or, while draining, be gone."""
        if self._is_stopping:
            os._exit(0)
        self._is_stopping = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._tasks.append(asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        timeout = self._settings.shutdown_timeout
        logger.info("finishing %d running requests (a second signal ends them now)", self._engine.num_in_flight)
        try:
            await asyncio.wait_for(self._engine.stop(drain=True), timeout)
        except asyncio.TimeoutError:
            logger.warning("aborting %d requests after %g seconds", self._engine.num_in_flight, timeout)
            await self._engine.stop(drain=False)
        self.should_exit = True

    async def _watch(self) -> None:
        while self._engine.error is None:
            await asyncio.sleep(WATCH_SECONDS)
        if self._settings.stay_on_failure:
            logger.error("the engine failed; staying, as told, to answer probes")
            return
        logger.error("the engine failed; the server exits")
        await asyncio.sleep(FAILURE_SECONDS)
        self.should_exit = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the process's status: 0 after a clean stop, 1 for a failure, 2 for wrong settings."""
    settings = parse_config(sys.argv[1:] if arguments is None else arguments, os.environ)
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s: %(message)s", stream=sys.stderr)
    for name in unknown_variables(os.environ):
        logger.warning("the environment variable %s is no setting of this server", name)
    os.environ.pop(variable("api_key"), None)  # no process that is started from here has a use for it
    try:
        with _ending_cleanly(), _bind(settings.host, settings.port) as listener:
            return _serve(settings, listener)
    except StartError as error:
        print(f"lrt-server: error: {error}", file=sys.stderr)
        return error.status


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """While the model loads there is nothing to finish: a signal ends the process with status 0. Later uvicorn's handlers
    take its place."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound before the model loads, so that a taken port is known at once. Raises StartError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"cannot listen on {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


def _serve(settings: ServerConfig, listener: socket.socket) -> int:
    from server.loading import answering

    try:
        keys = read_api_keys(settings)
    except ValueError as error:
        raise StartError(str(error), status=2) from None
    with answering(listener):
        from server.api.app import create_app  # this brings torch, which takes seconds
        from server.api.malformed import protocol

        service, greeting = _load(settings, keys)
    app = create_app(service)
    gc.collect()
    gc.freeze()  # what is loaded stays: to look through it for garbage takes 160 ms, during which nobody gets a token
    config = uvicorn.Config(
        app,
        http=protocol(),
        log_config=None,
        log_level="warning" if settings.log_level == "info" else settings.log_level,
        access_log=settings.log_level == "debug",
        timeout_graceful_shutdown=FLUSH_SECONDS,
        server_header=False,
    )
    server = Server(config, service.engine, settings, f"{greeting}; listening on {_url(listener)}")
    server.run(sockets=[listener])
    return 0 if service.engine.error is None else 1


def _load(settings: ServerConfig, keys: Sequence[str] = ()) -> tuple[Service, str]:
    """The engine and what surrounds it, and a line that tells of it. Raises StartError."""
    import torch

    from lrt_core.checkpoint import BUNDLED, CheckpointError, load_config
    from lrt_core.hardware import limit_threads
    from lrt_core.kernels import instruction_set
    from lrt_core.native_model import NativeModel
    from server.api.auth import ApiKeys
    from server.api.service import Service
    from server.engine.loader import LoadError, is_small, load_chat_template, load_engine
    from server.metrics import EngineMetrics

    checkpoint = settings.checkpoint or BUNDLED
    names = settings.served_model_name or (checkpoint.resolve().name if settings.checkpoint else BUNDLED_NAME,)
    started = time.monotonic()
    limit_threads()
    try:
        trained_len = load_config(checkpoint).sequence_len
        metrics = EngineMetrics(settings.metrics_prefix, names[0], settings.max_model_len or trained_len)
        engine = load_engine(_load_options(settings, checkpoint), metrics)
        chat = load_chat_template(engine.tokenizer, settings.chat_template)
    except LoadError as error:
        raise StartError(str(error), status=2) from None
    except (CheckpointError, OSError) as error:
        raise StartError(str(error)) from None
    model = engine.engine.runner.model
    if engine.config.max_model_len > trained_len:
        logger.warning("--max-model-len %d is beyond the trained %d tokens", engine.config.max_model_len, trained_len)
    if settings.threads or is_small(model.config, settings.device):
        torch.set_num_threads(settings.threads or 1)
    dtype = str(model.dtype).removeprefix("torch.")
    metrics.describe(engine.config, dtype, engine.engine.runner.pool.latents[0].nbytes, time.monotonic() - started)
    recurrence = model.config.recurrence
    path = f"{recurrence.variant}, source layer {recurrence.source_layer}" if recurrence else "off"
    weights = dtype if settings.quantize == "none" else f"{settings.quantize} weights, {dtype}"
    kernels = f"native kernels ({instruction_set()})" if isinstance(model, NativeModel) else "torch kernels"
    num_threads = torch.get_num_threads()
    operators = f"{weights}, {kernels}, {num_threads} thread{'s' if num_threads > 1 else ''}"
    greeting = f"serving {names[0]} ({checkpoint}): recurrence {path}; {operators}; cache of {engine.config.capacity} tokens"
    greeting += "; API key needed" if keys else ""
    service = Service(
        engine=engine,
        model_names=names,
        fingerprint=f"{engine.engine.weights_id}-{dtype}-{engine.config.prefill}",
        created=int(time.time()),
        exposition=metrics.exposition,
        max_body_size=settings.max_body_size,
        lenient=settings.lenient,
        max_logprobs=settings.max_logprobs,
        stream_interval=settings.stream_interval,
        chat=chat,
        keys=ApiKeys(keys),
    )
    return service, greeting


def _load_options(settings: ServerConfig, checkpoint: Path) -> LoadOptions:
    from server.engine.loader import LoadOptions

    return LoadOptions(
        checkpoint=checkpoint,
        dtype=settings.dtype,
        quantize=settings.quantize,
        deterministic=settings.deterministic,
        device=settings.device,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_waiting=settings.max_num_waiting,
        kv_cache_memory=settings.kv_cache_memory,
        block_size=settings.block_size,
        prefill=settings.prefill,
        prefill_window=settings.prefill_window,
        prefill_tolerance=settings.prefill_tolerance,
        prefix_caching=not settings.no_prefix_caching,
        check_invariants=settings.check_invariants,
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    sys.exit(main())
