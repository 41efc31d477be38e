"""schemathesis over the server's own OpenAPI document: a hundred examples of every operation, valid and not, against a real
engine over a tiny model. No failure of the server's, no answer that the document does not describe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.engine.loader import LoadOptions, load_engine
from tests.server.test_serving import Running, running

NUM_EXAMPLES = 100
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Running]:
    engine = load_engine(LoadOptions(checkpoint, dtype="float32", check_invariants=True))
    with running(engine) as server:  # type: ignore[arg-type]
        yield server
    assert engine.engine.blocks.num_free_blocks == engine.config.num_blocks


@pytest.mark.slow
def test_every_operation_keeps_what_the_document_promises(server: Running) -> None:
    with requests.Session() as session:
        found = session.get(server.url + "/openapi.json")
        if found.status_code == 404:
            pytest.skip("this server has no OpenAPI document")
        schema = schemathesis.openapi.from_dict(with_events(found.json()))
        schema.config.update(base_url=server.url)
        operations = [result.ok() for result in schema.get_all_operations()]
        assert {"POST /v1/completions", "GET /v1/models"} <= {operation.label for operation in operations}
        for operation in operations:
            takes_input = bool(operation.body or operation.path_parameters or operation.query)
            # Any text is a valid name of a model: only bodies can be wrong.
            for mode in GenerationMode if operation.body else (GenerationMode.POSITIVE,):
                seen = bombard(operation, mode, session)
                assert seen.total() >= (NUM_EXAMPLES if takes_input else 1), (operation.label, mode, seen)
                if operation.label == "POST /v1/completions" and mode.is_positive:
                    assert seen[200] >= NUM_EXAMPLES // 10, f"hardly an example is answered: {seen}"


def with_events(document: dict[str, Any]) -> dict[str, Any]:
    """The document, but for the schema of streams: there it describes the body's text, and schemathesis, which takes streams
    apart, would hold every event against it."""
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "minLength": 2}}}
    for path in document["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                stream = response.get("content", {}).get("text/event-stream")
                if stream is not None:
                    stream["schema"] = event
    return document


def bombard(operation: Any, mode: GenerationMode, session: requests.Session) -> Counter[int]:
    """Send examples of an operation, one where it takes nothing that could differ, and check the answers; counts statuses."""
    seen: Counter[int] = Counter()

    @settings(max_examples=NUM_EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        response = case.call_and_validate(checks=CHECKS, session=session, headers={"connection": "keep-alive"})
        seen[response.status_code] += 1

    send()
    return seen
