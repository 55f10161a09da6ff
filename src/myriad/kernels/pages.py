"""How the system holds a table."""

import ctypes
import mmap

from torch import Tensor

WORTH_ASKING = 2**22
"""Bytes from which a tensor is worth large pages."""


def in_large_pages(tensor: Tensor) -> Tensor:
    """Ask for large pages for a new tensor, before anything is written to it.

    Rows of a table are read in no order: in small pages, each one costs a walk through the system's tables of
    pages too (0.6 of the time of a lookup was measured, docs/LOG.md). Where the system has none to give, or the
    tensor is not in the CPU's memory, nothing happens.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    size = tensor.numel() * tensor.element_size()
    if advice is not None and tensor.device.type == "cpu" and size >= WORTH_ASKING:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + size - first
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)
    return tensor
