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
    for name, file in (("_MEMINFO", "meminfo"), ("_CGROUP", "cgroup"), ("_OWN_GROUPS", "own")):
        monkeypatch.setattr(hardware, name, tmp_path / file)
    (tmp_path / "meminfo").write_text("MemTotal:       99999 kB\nMemFree:         1024 kB\nMemAvailable:    8192 kB\n")
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "own").write_text("0::/\n")
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


def test_the_tightest_of_all_groups_counts(machine: Path) -> None:
    (machine / "own").write_text("0::/pod/container\n")
    (machine / "cgroup/pod/container").mkdir(parents=True)
    (machine / "cgroup/pod/memory.max").write_text(f"{4 * MIB}\n")
    (machine / "cgroup/pod/memory.current").write_text(f"{2 * MIB}\n")
    (machine / "cgroup/pod/memory.stat").write_text("inactive_file 0\n")
    assert hardware.available_memory("cpu") == 2 * MIB


def test_memory_of_the_first_version(machine: Path) -> None:
    (machine / "own").write_text("4:memory:/app\n1:cpu,cpuacct:/app\n")
    group = machine / "cgroup/memory/app"
    group.mkdir(parents=True)
    for name, text in (("limit", str(4 * MIB)), ("usage", str(3 * MIB))):
        (group / f"memory.{name}_in_bytes").write_text(f"{text}\n")
    (group / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {MIB}\n")
    assert hardware.available_memory("cpu") == 2 * MIB


def test_this_machine_has_memory_and_processors() -> None:
    assert hardware.available_memory("cpu") > 0
    assert hardware.usable_processors() >= 1


@pytest.fixture
def sixteen(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine, with sixteen processors."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(16))
    return machine


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 16), ("200000 100000", 2), ("50000 100000", 1), ("390000 100000", 3), ("9000000 50000", 16)],
)
def test_a_quota_limits_the_processors(sixteen: Path, quota: str, expected: int) -> None:
    (sixteen / "cgroup/cpu.max").write_text(f"{quota}\n")
    assert hardware.usable_processors() == expected


def test_the_quota_of_a_pod_holds_for_its_containers(sixteen: Path) -> None:
    (sixteen / "own").write_text("0::/pod/container\n")
    (sixteen / "cgroup/pod/container").mkdir(parents=True)
    (sixteen / "cgroup/pod/cpu.max").write_text("400000 100000\n")
    (sixteen / "cgroup/pod/container/cpu.max").write_text("max 100000\n")
    assert hardware.usable_processors() == 4


@pytest.mark.parametrize("folder", ["cpu,cpuacct/app", "cpu/app", "cpu"])
def test_quotas_of_the_first_version(sixteen: Path, folder: str) -> None:
    """Both controllers in one folder, or under the name of the one; the group's own folder, or as a container sees it."""
    (sixteen / "own").write_text("4:memory:/app\n1:cpu,cpuacct:/app\n")
    group = sixteen / "cgroup" / folder
    group.mkdir(parents=True)
    (group / "cpu.cfs_period_us").write_text("100000\n")
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert hardware.usable_processors() == 16
    (group / "cpu.cfs_quota_us").write_text("250000\n")
    assert hardware.usable_processors() == 2


def test_threads_are_no_more_than_processors(sixteen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    hardware.limit_threads()
    (sixteen / "cgroup/cpu.max").write_text("200000 100000\n")
    hardware.limit_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    hardware.limit_threads()
    assert taken == [8, 2]


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
