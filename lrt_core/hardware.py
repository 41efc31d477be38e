"""What the machine can do: the type to compute in, the memory to plan with. Used by the server's loader and the trainer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USAGE = Path("/sys/fs/cgroup/memory.current")


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
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    if limit.isdigit() and _CGROUP_USAGE.exists():
        free = min(free, int(limit) - int(_CGROUP_USAGE.read_text()))
    return max(free, 0)
