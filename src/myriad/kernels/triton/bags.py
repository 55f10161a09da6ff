"""Sums over bags of looked-up rows: `myriad.kernels.bags` in Triton, for tables of any floating dtype.

Legend: `M` bags, `A` entries a bag, `N` rows of the table, `D` width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from myriad.kernels.triton.launch import (
    PROGRAMS,
    SUM_COLUMNS,
    SUM_ENTRIES,
    TILE,
    columns_of,
    dot_blocks,
    launch,
    warps_of,
)


def bag_sum(table_ND: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> Tensor:
    """out[m] = sum over a of weights[m, a] * table[ids[m, a]], float32 of shape (M, D).

    Inputs that are not contiguous are copied, here and below.
    """
    bags, entries = ids_MA.shape
    width = table_ND.shape[1]
    out_MD = torch.empty(bags, width, dtype=torch.float32, device=table_ND.device)
    columns = min(SUM_COLUMNS, columns_of(width, bags))
    many = bags * triton.cdiv(width, columns) >= PROGRAMS
    numbers = SUM_ENTRIES * SUM_COLUMNS if many else TILE  # few programs take many rows at once instead
    block = min(numbers // columns, triton.next_power_of_2(max(entries, 1)))
    launch(
        _bag_sum,
        (bags, triton.cdiv(width, columns)),
        table_ND.contiguous(),
        ids_MA.contiguous(),
        weights_MA.contiguous(),
        out_MD,
        A=entries,
        D=width,
        BLOCK_A=block,
        BLOCK_D=columns,
        num_warps=warps_of(block * columns),
    )
    return out_MD


def bag_dot(table_ND: Tensor, ids_MA: Tensor, x_MD: Tensor) -> Tensor:
    """out[m, a] = table[ids[m, a]] . x[m], float32 of shape (M, A)."""
    out_MA = torch.empty(ids_MA.shape, dtype=torch.float32, device=table_ND.device)
    grid, blocks = dot_blocks(ids_MA, table_ND.shape[1])
    launch(_bag_dot, grid, table_ND.contiguous(), ids_MA.contiguous(), x_MD.contiguous(), out_MA, **blocks)
    return out_MA


@triton.jit
def entries_of(ids, A: tl.constexpr, BLOCK_A: tl.constexpr):
    """This program's bag, its entries' places in (M, A), which of them exist, and their rows."""
    bag = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    exists = entry < A
    places = bag * A + entry
    return bag, places, exists, tl.load(ids + places, mask=exists, other=0)


@triton.jit
def row_dots(table, rows, exists, x, bag, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr):
    """table[rows] . x[bag], one for each row."""
    products = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < D
        mask = exists[:, None] & inside[None, :]
        numbers = tl.load(table + rows[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        products += numbers * tl.load(x + bag * D + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.sum(products, 1)


@triton.jit
def _bag_dot(table, ids, x, out, A: tl.constexpr, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr):
    bag, places, exists, rows = entries_of(ids, A, BLOCK_A)
    tl.store(out + places, row_dots(table, rows, exists, x, bag, D, BLOCK_A, BLOCK_D), mask=exists)


@triton.jit
def _bag_sum(table, ids, weights, out, A: tl.constexpr, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    # Rows are added up in place and across only once, at the end.
    sums = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    for start in range(0, A, BLOCK_A):
        entry = start + tl.arange(0, BLOCK_A)
        exists = entry < A
        rows = tl.load(ids + bag * A + entry, mask=exists, other=0)
        weight = tl.load(weights + bag * A + entry, mask=exists, other=0.0).to(tl.float32)
        mask = exists[:, None] & inside[None, :]
        numbers = tl.load(table + rows[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += weight[:, None] * numbers
    tl.store(out + bag * D + column, tl.sum(sums, 0), mask=inside)
