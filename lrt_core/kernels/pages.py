"""Large pages for what a step reads from memory: weights and the cache. With them a processor looks up fewer addresses."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

_MADV_HUGEPAGE = 14
_PAGE = 4096


def advise_large_pages(tensor: Tensor) -> Tensor:
    """Ask Linux to back a CPU tensor that nobody has written yet with large pages; returns the tensor.

    Advice alone: elsewhere, and where the system keeps no such pages, nothing changes.
    """
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    size = (tensor.data_ptr() + tensor.nbytes - start) // _PAGE * _PAGE
    if sys.platform == "linux" and tensor.device.type == "cpu" and size > 0:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return tensor


def copy_to_large_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    return advise_large_pages(torch.empty(tensor.shape, dtype=tensor.dtype)).copy_(tensor)
