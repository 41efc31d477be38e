"""What the machine can do: the type to compute in, the memory to plan with. Used by the server's loader and the trainer."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


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
    limit, usage = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and usage.exists() and limit.read_text().strip() != "max":
        reclaimable = _read_table(_CGROUP / "memory.stat").get("inactive_file", 0)
        free = min(free, int(limit.read_text()) - int(usage.read_text()) + reclaimable)
    return max(free, 0)


def _read_table(path: Path) -> dict[str, int]:
    """The kernel's files of one `name number` a line."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}
