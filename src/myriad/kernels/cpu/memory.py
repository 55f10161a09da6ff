"""Large arrays that are made anew at every step, kept from one step to the next.

The operating system hands out memory zeroed page by page, which takes longer than to fill it: an array that is
no longer used is kept for the next of its size, and its pages are large where the system has such.
"""

import math
import mmap
import os
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KEPT = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 if hasattr(os, "sysconf") else 2**31
"""Bytes of unused arrays kept, of those that were freed last: a step's table gradients are all there at once."""
WORTH_KEEPING = 2**19
"""Bytes from which an array is kept."""

_free: list[mmap.mmap] = []
_lock = threading.RLock()  # the garbage collector may free an array while this thread takes another


def new_tensor(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor."""
    size = math.prod(shape) * dtype.itemsize
    if size < WORTH_KEEPING:
        return torch.empty(tuple(shape), dtype=dtype)
    block = _take(size)
    array = np.frombuffer(block, np.uint8, size)
    weakref.finalize(array, _give_back, block)
    return torch.from_numpy(array).view(dtype).view(*shape)


def _take(size: int) -> mmap.mmap:
    """A block of at least `size` bytes, of those kept the smallest that is not twice as large as it need be."""
    with _lock:
        fitting = [block for block in _free if size <= len(block) <= 2 * size]
        if fitting:
            block = min(fitting, key=len)
            _free.remove(block)
            return block
    block = mmap.mmap(-1, size + size // 8)  # the next step's may be somewhat larger
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    with _lock:
        _free.append(block)
        kept = sum(len(block) for block in _free)
        while kept > KEPT:
            kept -= len(_free.pop(0))
