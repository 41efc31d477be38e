"""Native CPU kernels where the package's build found a compiler, and beside each the torch twin that serves elsewhere.

The library is plain C++ loaded through ctypes. `is_native` tells which of the two is in use; parity tests and benchmarks switch
with `native(False)`. Neighbours: `native.cpp` is the source, `paged.py` the caller.

Shapes: S sequences, C context, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lrt_core.attention import attention

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def _load() -> ctypes.CDLL | None:
    """The library, or None where it was not built or does not run here."""
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        return None
    try:
        # The kernels' threads must come from the OpenMP runtime that torch uses, or two pools would spin against each other.
        ctypes.CDLL(_openmp(), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(built[0]))
    except OSError:
        return None


def _openmp() -> str:
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for library in sorted(folder.glob("libgomp*.so*")):
            return str(library)
    return "libgomp.so.1"


_library = _load()
_enabled = True


def is_native() -> bool:
    """Whether native kernels run."""
    return _library is not None and _enabled


@contextmanager
def native(enabled: bool) -> Iterator[None]:
    """Switch native kernels on (where they exist) or off within a block."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, context_lens: Tensor, mask: Tensor, window: int
) -> Tensor:
    """Attention of one query row per sequence over its slots of a paged cache, without gathering them.

    query [S, N, H]; keys and values [num_slots, G, H]; slots int64 [S, C]; context_lens int64 [S], each at least 1; a query
    sees its last window + 1 tokens, which `mask` [S, 1, 1, C] says too. Returns [S, N, H].
    """
    tensors = (query, keys, values, slots, context_lens)
    fits = query.device.type == "cpu" and query.dtype in _DTYPES and keys.dtype == values.dtype == query.dtype
    if not (is_native() and fits and all(tensor.is_contiguous() for tensor in tensors)):
        return decode_attention_twin(query, keys, values, slots, mask)
    assert _library is not None
    num_sequences, num_heads, head_dim = query.shape
    out = torch.empty_like(query)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (query, keys, values, out, slots)]
    sizes = (num_sequences, num_heads, keys.shape[1], head_dim, window)
    _library.lrt_decode_attention(
        _DTYPES[query.dtype],
        *pointers,
        ctypes.c_int64(slots.shape[1]),
        ctypes.c_void_p(context_lens.data_ptr()),
        *map(ctypes.c_int64, sizes),
        ctypes.c_float(head_dim**-0.5),
        torch.get_num_threads(),
    )
    return out


def decode_attention_twin(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    """`decode_attention` by gather and SDPA. The query heads of one KV head stand as its queries: nothing is repeated."""
    num_sequences, _, head_dim = query.shape
    grouped = query.reshape(num_sequences, keys.shape[1], -1, head_dim).transpose(1, 2)
    out = attention(grouped, keys[slots], values[slots], mask=mask)
    return out.transpose(1, 2).flatten(1, 2)
