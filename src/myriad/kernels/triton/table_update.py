"""`lazy_adam` in Triton: one program a row of the gradient, which ends where the row is all zero.

The moments, the table and, for the rounded form, the random bits are those of the reference: a row is read, moved and
written in one pass, and nothing of the table's size is held beside it.

Legend: `U` rows of the gradient, `N` rows of the table, `D` width.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from myriad.kernels.table_update import AdamStep, TableUpdateFunctions
from myriad.kernels.triton.launch import launch, warps_of
from myriad.kernels.triton.rounding import moved, random_bits, rounded_by, signed

WIDEST = 2048
"""Columns of a block: wider rows are passed over in several."""


def full(table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ids: Tensor | None, rows: Tensor, step: AdamStep) -> None:
    """Moments of the table's shape and dtype."""
    _update(_full, table, exp_avg, exp_avg_sq, ids, rows, step)


def rounded(
    table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ids: Tensor | None, rows: Tensor, step: AdamStep
) -> None:
    """A bfloat16 table and first moment, rounded stochastically; one float32 second moment a row."""
    _update(_rounded, table, exp_avg, exp_avg_sq, ids, rows, step, signed(step.salt))


FUNCTIONS = TableUpdateFunctions(full, rounded)


def _update(
    kernel: Any,
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ids: Tensor | None,
    rows: Tensor,
    step: AdamStep,
    *more: int,
) -> None:
    """Run a kernel on the state in place."""
    rows = rows.contiguous()
    width = rows.shape[1]
    block = min(WIDEST, triton.next_power_of_2(width))
    shares = (1 - step.betas[0], 1 - step.betas[1])
    numbers = (*shares, step.eps, step.size)
    arguments = (table, exp_avg, exp_avg_sq, rows if ids is None else ids.contiguous(), rows, *numbers, *more)
    options = {"D": width, "BLOCK_D": block, "num_warps": warps_of(2 * block)}
    near = {"NEAR": shares[0] < 0.5, "SQUARE_NEAR": shares[1] < 0.5}
    launch(kernel, (len(rows),), *arguments, DENSE=ids is None, **near, **options)


@triton.jit
def _row_of(ids, DENSE: tl.constexpr):
    """The gradient's row of this program, and the table's."""
    source = tl.program_id(0).to(tl.int64)
    if DENSE:
        row = source
    else:
        row = tl.load(ids + source)
    return source, row


@triton.jit
def _summary(rows, source, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Not 0 if any number of a row is not zero, and the sum of their squares, which may be too small to tell."""
    used = tl.zeros((BLOCK_D,), tl.int32)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        grad = tl.load(rows + source * D + column, mask=column < D, other=0.0).to(tl.float32)
        used = tl.maximum(used, grad.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        squares += grad * grad
    return tl.max(used, 0), tl.sum(squares, 0)


@triton.jit(do_not_specialize=["share", "square_share", "eps", "size"])
def _full(
    table,
    exp_avg,
    exp_avg_sq,
    ids,
    rows,
    share,
    square_share,
    eps,
    size,
    DENSE: tl.constexpr,
    NEAR: tl.constexpr,
    SQUARE_NEAR: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    source, row = _row_of(ids, DENSE)
    used, _ = _summary(rows, source, D, BLOCK_D)
    if used != 0:
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            inside = column < D
            place = row * D + column
            grad = tl.load(rows + source * D + column, mask=inside, other=0.0).to(tl.float32)
            mean = moved(tl.load(exp_avg + place, mask=inside, other=0.0), grad, share, NEAR)
            square = moved(tl.load(exp_avg_sq + place, mask=inside, other=0.0), grad * grad, square_share, SQUARE_NEAR)
            old = tl.load(table + place, mask=inside, other=0.0)
            tl.store(exp_avg + place, mean, mask=inside)
            tl.store(exp_avg_sq + place, square, mask=inside)
            move = tl.div_rn(mean, tl.sqrt_rn(square) + eps) * size
            tl.store(table + place, old - move, mask=inside)


@triton.jit(do_not_specialize=["share", "square_share", "eps", "size", "salt"])
def _rounded(
    table,
    exp_avg,
    exp_avg_sq,
    ids,
    rows,
    share,
    square_share,
    eps,
    size,
    salt,
    DENSE: tl.constexpr,
    NEAR: tl.constexpr,
    SQUARE_NEAR: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    source, row = _row_of(ids, DENSE)
    used, squares = _summary(rows, source, D, BLOCK_D)
    if used != 0:
        square = moved(tl.load(exp_avg_sq + row), tl.div_rn(squares, D * 1.0), square_share, SQUARE_NEAR)
        tl.debug_barrier()  # every warp has read the old moment before one writes the new one
        tl.store(exp_avg_sq + row, square)
        scale = tl.div_rn(size, tl.sqrt_rn(square) + eps)  # once a row: a division takes as long as all else
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            inside = column < D
            place = row * D + column
            grad = tl.load(rows + source * D + column, mask=inside, other=0.0).to(tl.float32)
            mean = moved(tl.load(exp_avg + place, mask=inside, other=0.0).to(tl.float32), grad, share, NEAR)
            old = tl.load(table + place, mask=inside, other=0.0).to(tl.float32)
            random = random_bits(place, salt)
            new = old - scale * mean
            tl.store(table + place, rounded_by(new, random & 0xFFFF), mask=inside)
            tl.store(exp_avg + place, rounded_by(mean, random >> 16), mask=inside)
