"""Launching kernels, and the sizes of their blocks."""

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

TILE = 4096
"""Numbers that a program of 4 warps holds at once: eight 16-byte loads a thread of float32."""
PROGRAMS = 1024
"""Programs that fill a large GPU: with fewer at hand, blocks are made smaller."""
ROW = 256
"""Columns of a block: a kilobyte of float32, so that each row is read in long runs."""
DOT_ENTRIES, DOT_COLUMNS = 32, 128
"""Rows and columns of a block of which a program takes dot products."""
SUM_ENTRIES, SUM_COLUMNS = 8, 128
"""Of a block that one warp adds up."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument, a tensor; an empty grid is no launch."""
    if 0 in grid:
        return
    device = arguments[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*arguments, **options)


def columns_of(width: int, rows: int = PROGRAMS) -> int:
    """Columns of a block, a power of two: fewer where few rows would leave the GPU idle."""
    columns = min(ROW, max(16, triton.next_power_of_2(width)))
    while columns > 32 and rows * triton.cdiv(width, columns) < PROGRAMS:
        columns //= 2
    return columns


def warps_of(numbers: int) -> int:
    """Warps for a block of so many numbers."""
    return min(4, max(1, numbers * 4 // TILE))


def dot_blocks(ids_MA: Tensor, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and sizes of a kernel whose programs take dot products with some rows of one bag each."""
    bags, entries = ids_MA.shape
    columns = min(DOT_COLUMNS, columns_of(width))
    block = min(DOT_ENTRIES, triton.next_power_of_2(max(entries, 1)))
    while block > 2 and bags * triton.cdiv(entries, block) < PROGRAMS:
        block //= 2
    sizes = {"A": entries, "D": width, "BLOCK_A": block, "BLOCK_D": columns}
    return (bags, triton.cdiv(entries, block)), {**sizes, "num_warps": warps_of(block * columns)}
