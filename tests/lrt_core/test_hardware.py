"""What the machine can do, with a machine's files put in the place of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrt_core import hardware

KIB, MIB = 2**10, 2**20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 MiB available and a container without a limit."""
    for name, file in (("_MEMINFO", "meminfo"), ("_CGROUP", "cgroup")):
        monkeypatch.setattr(hardware, name, tmp_path / file)
    (tmp_path / "meminfo").write_text("MemTotal:       99999 kB\nMemFree:         1024 kB\nMemAvailable:    8192 kB\n")
    (tmp_path / "cgroup").mkdir()
    limit(tmp_path, "max", 3 * MIB)
    return tmp_path


def limit(machine: Path, maximum: str, current: int, inactive_file: int = 0) -> None:
    (machine / "cgroup" / "memory.max").write_text(f"{maximum}\n")
    (machine / "cgroup" / "memory.current").write_text(f"{current}\n")
    (machine / "cgroup" / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\nactive_file 7\n")


def test_what_the_kernel_would_give_counts_not_what_lies_idle(machine: Path) -> None:
    """Free pages alone would leave out the page cache, in which a checkpoint just read lies."""
    assert hardware.available_memory("cpu") == 8 * MIB


def test_a_container_sees_its_limit(machine: Path) -> None:
    limit(machine, str(4 * MIB), 3 * MIB)
    assert hardware.available_memory("cpu") == MIB
    limit(machine, str(64 * MIB), 3 * MIB)
    assert hardware.available_memory("cpu") == 8 * MIB


def test_files_that_a_container_has_read_are_not_held_against_it(machine: Path) -> None:
    limit(machine, str(4 * MIB), 3 * MIB, inactive_file=2 * MIB)
    assert hardware.available_memory("cpu") == 3 * MIB


def test_never_below_zero(machine: Path) -> None:
    limit(machine, str(MIB), 2 * MIB)
    assert hardware.available_memory("cpu") == 0


def test_without_cgroups(machine: Path) -> None:
    for file in (machine / "cgroup").iterdir():
        file.unlink()
    assert hardware.available_memory("cpu") == 8 * MIB


def test_this_machine_has_memory() -> None:
    assert hardware.available_memory("cpu") > 0


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_fast_bf16_by_capability(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert hardware.has_fast_bf16("cpu") is expected
