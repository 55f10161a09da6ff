"""What the hardware is, and what it does fast."""

import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch


@cache
def multiplies_bfloat16_fast(device_type: str) -> bool:
    """Whether products of bfloat16 matrices have units of their own: CUDA, and CPUs with AVX512-BF16 or AMX."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


@cache
def multiplies_few_rows_fast() -> bool:
    """Whether all threads share the product of one to four rows with a large matrix: MKL's, which PyTorch asks, on
    Intel's processors alone."""
    return torch.backends.mkl.is_available() and _told("vendor_id") == "GenuineIntel"


def processor() -> str:
    """The processor's name and its number of cores."""
    return f"{_told('model name') or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _told(field: str) -> str | None:
    """What Linux tells of the first processor."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(field))
    return None
