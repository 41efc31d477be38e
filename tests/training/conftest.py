"""What several tests of training start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of twenty small source files."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index}.py").write_text(f"def function_{index}(value):\n    return value * {index}\n" * 30)
    return folder
