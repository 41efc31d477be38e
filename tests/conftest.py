"""Fixtures for all tests, and one thread: two busy ones on a shared machine spin at OpenMP's barriers. Generated examples are
the same in every run and have no deadline: a slow machine is no failure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lrt_core.checkpoint import save_checkpoint
from lrt_core.convert import main as convert
from tests.helpers import GOLDEN, GOLDEN_NAMES, tiny_model, tiny_tokenizer

collect_ignore = ["clients/live"]  # for `make clients`: they run beside the clients, which are not installed here
torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def golden_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden cases, each turned into a checkpoint by `lrt-convert`. Read only."""
    folder = tmp_path_factory.mktemp("golden")
    for name in GOLDEN_NAMES:
        assert convert([str(GOLDEN / name), str(folder / name)]) == 0
    return {name: folder / name for name in GOLDEN_NAMES}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny layerwise checkpoint in float32, fresh for each test, so that it may be damaged."""
    save_checkpoint(tmp_path / "checkpoint", tiny_model(), tiny_tokenizer())
    return tmp_path / "checkpoint"
