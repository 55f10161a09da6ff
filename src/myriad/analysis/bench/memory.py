"""Memory: what is free, and what a run takes beyond what lay there before.

On CUDA, PyTorch's allocator counts its tensors. On a CPU the resident pages of the process are what the machine must
have: they hold the scratch memory of libraries too, which PyTorch's own accounting does not see, and leave out pages of
zeros that were asked for and never touched. Linux keeps their peak (`VmHWM`) and sets it back on request
(`/proc/self/clear_refs`). Freed memory that the C library keeps for itself would count as having lain there before, so
it is given back first. Other systems cannot set the peak back: there is no figure there.
"""

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

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


def peak_above(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a run takes at its peak beyond those held before; None where this cannot be measured."""
    wait_for(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _give_back_freed_memory()
        (PROCESS / "clear_refs").write_text(RESET_PEAK)
        before = _kilobytes(PROCESS / "status", "VmRSS")
        run()
        return max(0, _kilobytes(PROCESS / "status", "VmHWM") - before)
    except OSError:
        return None


def _give_back_freed_memory() -> None:
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(path: Path, field: str) -> int:
    """A field of a file of /proc, in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", path.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{path} has no {field}")
    return 1024 * int(found[1])
