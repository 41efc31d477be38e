"""What a client gets over HTTP against the authors' release: converted checkpoint, float32, id prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from server.api.app import create_app
from server.api.service import Service
from server.engine.loader import LoadOptions, load_engine
from tests.helpers import GOLDEN_NAMES, PLAIN_GOLDEN, RECURRENT_GOLDEN, golden_expected

LOGPROB_TOLERANCE = 1e-3


@contextmanager
def client(checkpoint: Path, prefill: str) -> Iterator[TestClient]:
    options = LoadOptions(
        checkpoint,
        dtype="float32",
        prefill="window" if prefill == "window" else "sequential",
        prefill_window=16,
        check_invariants=True,
    )
    engine = load_engine(options)
    service = Service(engine, ("golden",), "fingerprint", 0, lambda: b"", 2**20)
    with TestClient(create_app(service)) as test_client:
        yield test_client
    assert engine.engine.blocks.num_free_blocks == engine.config.num_blocks


@pytest.mark.parametrize("prefill", ["window", "sequential"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_echoed_logprobs_are_the_release_s(name: str, prefill: str, golden_checkpoints: dict[str, Path]) -> None:
    expected = golden_expected(name)
    logits = expected["logits" if name == PLAIN_GOLDEN else "recurrent_logits"]
    with client(golden_checkpoints[name], prefill) as http:
        for tokens, row in zip(expected["tokens"].tolist(), torch.log_softmax(logits, dim=-1), strict=True):
            body = {"model": "golden", "prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
            response = http.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            logprobs = response.json()["choices"][0]["logprobs"]
            assert logprobs["token_logprobs"][0] is None
            actual = torch.tensor(logprobs["token_logprobs"][1:])
            wanted = row[:-1].gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1)).squeeze(-1)
            assert actual.shape == wanted.shape
            assert (actual - wanted).abs().max() < LOGPROB_TOLERANCE
            best = torch.tensor([max(top.values()) for top in logprobs["top_logprobs"][1:]])
            assert (best - row[:-1].max(-1).values).abs().max() < LOGPROB_TOLERANCE


@pytest.mark.parametrize("prefill", ["window", "sequential"])
@pytest.mark.parametrize("name", RECURRENT_GOLDEN)
def test_greedy_tokens_are_the_release_s(name: str, prefill: str, golden_checkpoints: dict[str, Path]) -> None:
    expected = golden_expected(name)
    prompt, wanted = expected["tokens"][0, :16].tolist(), expected["greedy_tokens"].tolist()
    assert wanted[:16] == prompt
    with client(golden_checkpoints[name], prefill) as http:
        body = {
            "model": "golden",
            "prompt": prompt,
            "max_tokens": len(wanted) - 16,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["token_ids"] == wanted[16:]
