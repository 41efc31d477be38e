"""Probes, models and numbers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.api.routes import STALLED_SECONDS
from tests.helpers import tiny_config
from tests.server.fakes import MAX_MODEL_LEN, FakeEngine, assert_envelope, call, make_app


def get(path: str, engine: FakeEngine | None = None, **state: Any) -> Any:
    engine = engine or FakeEngine()
    for name, value in state.items():
        setattr(engine, name, value)
    return call(make_app(engine), "GET", path)


def test_models_list_every_name() -> None:
    listed = get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["tiny", "alias"]
    assert listed["data"][0] == {
        "id": "tiny",
        "object": "model",
        "created": 1,
        "owned_by": "lrt-server",
        "max_model_len": MAX_MODEL_LEN,
        "recurrence": {"variant": "layerwise", "source_layer": 2},
    }
    assert get("/v1/models/alias").json() == listed["data"][1]


def test_a_plain_backbone_has_no_recurrence() -> None:
    assert get("/v1/models/tiny", model_config=tiny_config(recurrence=None)).json()["recurrence"] is None


@pytest.mark.parametrize("name", ["other", "org/other", "%F0%9F%98%80"])
def test_unknown_model(name: str) -> None:
    assert_envelope(get(f"/v1/models/{name}"), 404, "model_not_found", "model")


@pytest.mark.parametrize("path", ["/health", "/ready", "/live"])
def test_probes_answer_get_and_head(path: str) -> None:
    assert get(path).json()["status"] == "ok"
    assert call(make_app(FakeEngine()), "HEAD", path).status_code == 200


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        ({"is_draining": True}, None, "draining"),
        ({"error": RuntimeError("secret")}, "engine_dead", "not_ready"),
        ({"last_step_age": STALLED_SECONDS + 1}, "engine_stalled", None),
    ],
)
def test_probes_tell_what_is_wrong(state: dict[str, Any], health: str | None, ready: str | None) -> None:
    for path, code in (("/health", health), ("/ready", ready), ("/live", None)):
        response = get(path, **state)
        if code is None:
            assert response.status_code == 200
        else:
            assert "secret" not in assert_envelope(response, 503, code)
            assert response.headers["retry-after"] == "1"


def test_version_load_and_metrics() -> None:
    assert set(get("/version").json()) == {"version", "torch", "python"}
    engine = FakeEngine()
    engine.running = {object(), object()}  # type: ignore[arg-type]
    assert get("/load", engine).json() == {"server_load": 2}
    page = get("/metrics")
    assert page.text == "# the metrics page\n"
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_application_starts_and_stops_the_engine() -> None:
    engine = FakeEngine()

    async def live() -> None:
        app = make_app(engine)
        async with app.router.lifespan_context(app):
            assert engine.is_started and not engine.is_stopped

    asyncio.run(live())
    assert engine.is_stopped and engine.is_aborting
