"""Native CPU kernels where the package's build found a compiler, and beside each the torch twin that serves elsewhere.

The library is plain C++ loaded through ctypes. `is_native` tells which of the two is in use; parity tests and benchmarks switch
with `native(False)`. Native code has no backward, so it runs only where no gradients are recorded.
Neighbours: `native.cpp` is the source, `model.py` and `paged.py` are the callers.

Shapes: T tokens, S sequences, C context, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt_core.kernels.plan import declare

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_VERSION = 10
"""Of the library's functions; raised with every change of one, so that a library from an older build is not called."""
_EPS = torch.finfo(torch.float32).eps
"""Of every norm, in bfloat16 too."""


def _load() -> ctypes.CDLL | None:
    """The library, or None where it was not built, does not run here or is of another version."""
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        return None
    try:
        # The kernels' threads must come from the OpenMP runtime that torch uses, or two pools would spin against each other.
        ctypes.CDLL(_openmp(), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(built[0]))
    except OSError:
        return None
    if not hasattr(library, "lrt_version") or library.lrt_version() != _VERSION:
        return None
    declare(library)
    return library


def _openmp() -> str:
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for library in sorted(folder.glob("libgomp*.so*")):
            return str(library)
    return "libgomp.so.1"


_library = _load()
_enabled = True
num_switches = 0
"""How often another instruction set was taken; each cuts workspaces in its own way."""


def is_native() -> bool:
    """Whether native kernels run."""
    return _library is not None and _enabled


def library() -> ctypes.CDLL:
    """The native functions, for a caller that has asked `is_native`."""
    assert _library is not None
    return _library


def instruction_set() -> str:
    """Which of its instruction sets the native step uses here."""
    name: bytes = library().lrt_instruction_set()
    return name.decode()


def has_pairs() -> bool:
    """Whether it multiplies pairs of whole numbers, and bfloat16 weights had best be held as such, of 12 bits."""
    return bool(library().lrt_has_pairs())


def has_bytes() -> bool:
    """Whether it multiplies bytes, and int8 weights had best be held for that."""
    return bool(library().lrt_has_bytes())


def instruction_sets() -> list[str]:
    """All that this processor has, the best first."""
    found: list[str] = []
    while (name := library().lrt_available_set(len(found))) is not None:
        found.append(name.decode())
    return found


@contextmanager
def using_instruction_set(name: str) -> Iterator[None]:
    """Take another one of `instruction_sets` within a block, for models and operands made there."""
    before = instruction_set()
    _use(name)
    try:
        yield
    finally:
        _use(before)


def _use(name: str) -> None:
    global num_switches
    num_switches += 1
    library().lrt_use_set(instruction_sets().index(name))


@contextmanager
def native(enabled: bool) -> Iterator[None]:
    """Switch native kernels on (where they exist) or off within a block."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def _can_run(x: Tensor) -> bool:
    """Whether native code may take `x`, its layout aside."""
    return is_native() and not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype in _DTYPES


def norm(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """RMS norm over the last axis without learned weights, in `dtype` (x's own without it); computed in at least float32."""
    target = dtype or x.dtype
    is_narrowing = (x.dtype, target) in ((torch.float32, torch.bfloat16), (x.dtype, x.dtype))
    if not (_can_run(x) and is_narrowing and x.is_contiguous()):
        return norm_twin(x).to(target)
    assert _library is not None
    out = torch.empty_like(x, dtype=target)
    size = x.shape[-1]
    _library.lrt_norm(
        _DTYPES[x.dtype],
        _DTYPES[target],
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(x.numel() // size),
        ctypes.c_int64(size),
        ctypes.c_float(_EPS),
        torch.get_num_threads(),
    )
    return out


def norm_twin(x: Tensor) -> Tensor:
    """`norm` by torch, in x's type."""
    return F.rms_norm(x, (x.shape[-1],), eps=_EPS)


def rope_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads, then norm each: x [..., T, heads, H], cos and sin float32 [..., T, 1, H/2]; result like x.

    The first half of a head pairs with its second half: y1 = x1 cos + x2 sin, y2 = x2 cos - x1 sin.
    """
    flat = x.ndim == cos.ndim == 3 and x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
    if not (_can_run(x) and flat and cos.is_contiguous() and sin.is_contiguous()):
        return rope_norm_twin(x, cos, sin)
    assert _library is not None and cos.dtype == sin.dtype == torch.float32
    num_tokens, num_heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    _library.lrt_rope_norm(
        _DTYPES[x.dtype],
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.stride(0)),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (cos, sin, out)),
        *map(ctypes.c_int64, (num_tokens, num_heads, head_dim)),
        ctypes.c_float(_EPS),
        torch.get_num_threads(),
    )
    return out


def rope_norm_twin(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope_norm` by torch, in x's type throughout."""
    return norm_twin(rotate(x, cos, sin))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation alone; shapes as in `rope_norm`."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)
