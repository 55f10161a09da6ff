"""Memory: what is free, what the process holds, and what of some tensors is really there.

On CUDA, PyTorch's allocator counts its tensors. On a CPU the resident pages of the process are what the machine must
have: they hold the scratch memory of libraries too, which PyTorch's own accounting does not see. Linux keeps their
peak (`VmHWM`) and sets it back on request (`/proc/self/clear_refs`).
"""

import ctypes
import mmap
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from myriad.analysis.bench.timing import wait_for

RESET_PEAK = "5"
PROCESS = Path("/proc/self")


def available_bytes(device: torch.device) -> int | None:
    """Memory that a new tensor could have; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps for itself is free, too
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        return _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    return None


def lack(needed: float, device: torch.device) -> str | None:
    """Why something that needs so many bytes is left out; None where it fits."""
    free = available_bytes(device)
    if free is None or needed <= free:
        return None
    return f"skipped: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def tells_peak(device: torch.device) -> bool:
    """Whether the peak of a part of a run can be known here."""
    return device.type == "cuda" or (PROCESS / "clear_refs").exists()


def held_bytes(device: torch.device) -> int:
    """What the process holds now. Freed memory that the C library has kept is given back first."""
    wait_for(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    return _kilobytes(PROCESS / "status", "VmRSS")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that the process holds while something runs."""
    reset_peak(device)
    run()
    return peak_since(device)


def reset_peak(device: torch.device) -> None:
    """Let the peak be counted from now on."""
    held_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        (PROCESS / "clear_refs").write_text(RESET_PEAK)


def peak_since(device: torch.device) -> int:
    """The most that the process has held since the last `reset_peak`."""
    wait_for(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(PROCESS / "status", "VmHWM")


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors take: on a CPU without pages that were asked for and never touched."""
    return sum(tensor.nbytes if tensor.is_cuda else _touched(tensor) for tensor in tensors)


def _touched(tensor: Tensor) -> int:
    """Bytes of the whole pages of a tensor that are in memory."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    pages = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
    if pages <= 0:
        return 0
    there = torch.empty(pages, dtype=torch.uint8)
    address, length = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(pages * mmap.PAGESIZE)
    if ctypes.CDLL(None, use_errno=True).mincore(address, length, ctypes.c_void_p(there.data_ptr())):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((there & 1).sum()) * mmap.PAGESIZE


def _kilobytes(path: Path, field: str) -> int:
    """A field of a file of /proc, in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", path.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{path} has no {field}")
    return 1024 * int(found[1])
