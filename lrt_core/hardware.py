"""What the machine can do: the type to compute in, the memory to plan with, the processors to keep busy.

Limits are those of all control groups around the process (cgroups(7)), of version 2 and of version 1. Used by whatever loads a
model: the server, the trainer and the commands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether bfloat16 products run in hardware there (AVX512-BF16 or AMX on x86, BF16 on arm, CUDA from 8.0 on)."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def available_memory(device: torch.device | str) -> int:
    """Bytes that can still be taken on the device, a container's limit included."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # What the page cache holds can be had back: after reading a large checkpoint most memory may lie there.
    free = _read_table(_MEMINFO)["MemAvailable:"] * 1024
    for group in _groups("memory"):
        for limit, usage, reclaimable in _MEMORY_FILES:
            if (group / limit).exists() and (group / usage).exists() and (group / limit).read_text().strip() != "max":
                rest = _read_table(group / "memory.stat").get(reclaimable, 0)
                free = min(free, int((group / limit).read_text()) - int((group / usage).read_text()) + rest)
    return max(free, 0)


def usable_processors() -> int:
    """Processors that this process can keep busy: those it may run on, and no more than a container's quota pays for."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for group in _groups("cpu"):
        quota, period = _quota(group)
        if quota > 0:
            count = min(count, quota / period)
    return max(1, int(count))


def limit_threads() -> None:
    """Let torch have no more threads than processors. Beyond a quota all are stopped together, tens of milliseconds at a time;
    threads of a step wait for one another, so half of one would do so too. OMP_NUM_THREADS, where set, has the last word."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_processors()))


_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 and of version 1: the limit, what is used, and what of it can be had back."""


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the process's group and of those around it. Inside a container the path that the kernel tells may be that of
    the host, of which only the container's own part, as the root, can be seen."""
    if not _OWN_GROUPS.exists():
        return
    for line in _OWN_GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUP / controllers
        if controllers and not root.exists():
            root = _CGROUP / controller
        group = root / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder == root or root in folder.parents)


def _quota(group: Path) -> tuple[int, int]:
    """Microseconds of processor time in a period; -1 for no quota."""
    both, quota, period = (group / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
    if both.exists():
        words = both.read_text().split()
        return -1 if words[0] == "max" else int(words[0]), int(words[1])
    if quota.exists() and period.exists():
        return int(quota.read_text()), int(period.read_text())
    return -1, 1


def _read_table(path: Path) -> dict[str, int]:
    """The kernel's files of one `name number` a line."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}
