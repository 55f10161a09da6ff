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


def processor() -> str:
    """The processor's name and its number of cores."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {os.cpu_count()} cores"
