"""The lazy optimizer step, row by row: each is read, moved and written once.

Legend: `N` rows, `D` width, `U` rows of the gradient.
"""

from typing import Any

import numpy as np
from torch import Tensor

from myriad.kernels.cpu.simd import array, bits_of, compiled, inlined, prefetch_row, wide
from myriad.kernels.cpu.threads import in_parallel
from myriad.kernels.table_update import AdamStep, TableUpdateFunctions

GRAIN = 256
"""Rows worth a thread of their own."""
AHEAD = 8
"""Rows that are on their way while one is computed with; each is three, of the table and both moments."""


def _full(table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ids: Tensor | None, rows: Tensor, step: AdamStep) -> None:
    beta1, beta2 = step.betas
    in_parallel(
        _move_full,
        len(rows),
        array(table),
        array(exp_avg),
        array(exp_avg_sq),
        *_ids(ids),
        array(rows),
        np.float32(1 - beta1),
        np.float32(1 - beta2),
        np.float32(step.eps),
        np.float32(step.size),
        grain=GRAIN,
    )


def _ids(ids: Tensor | None) -> tuple[np.ndarray, bool]:
    return (np.empty(0, np.int64), False) if ids is None else (array(ids), True)


@inlined
def _is_zero(rows: Any, place: int) -> Any:
    seen = np.uint32(0)  # an or of bits has no order to keep, as a maximum with NaN in it has
    for d in range(rows.shape[1]):
        seen |= bits_of(wide(rows[place, d]))
    return seen << np.uint32(1) == 0  # all but the sign


@compiled
def _move_full(
    start: int,
    stop: int,
    table: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    ids: Any,
    sparse: bool,
    rows: Any,
    new1: float,
    new2: float,
    eps: float,
    size: float,
) -> None:
    for place in range(start, stop):
        if sparse and place + AHEAD < stop:
            later = ids[place + AHEAD]
            prefetch_row(table, later)
            prefetch_row(exp_avg, later)
            prefetch_row(exp_avg_sq, later)
        if _is_zero(rows, place):
            continue
        row = ids[place] if sparse else place
        for d in range(rows.shape[1]):
            grad = rows[place, d]
            mean = exp_avg[row, d] + new1 * (grad - exp_avg[row, d])
            square = exp_avg_sq[row, d] + new2 * (grad * grad - exp_avg_sq[row, d])
            exp_avg[row, d], exp_avg_sq[row, d] = mean, square
            table[row, d] -= size * mean / (np.sqrt(square) + eps)


def _rounded(
    table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ids: Tensor | None, rows: Tensor, step: AdamStep
) -> None:
    beta1, beta2 = step.betas
    in_parallel(
        _move_rounded,
        len(rows),
        array(table),
        array(exp_avg),
        array(exp_avg_sq),
        *_ids(ids),
        array(rows.bfloat16()),
        np.float32(1 - beta1),
        np.float32(1 - beta2),
        np.float32(step.eps),
        np.float32(step.size),
        np.uint32(step.salt),
        grain=GRAIN,
    )


@compiled
def _move_rounded(
    start: int,
    stop: int,
    table: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    ids: Any,
    sparse: bool,
    rows: Any,
    new1: float,
    new2: float,
    eps: float,
    size: float,
    salt: int,
) -> None:
    width = rows.shape[1]
    for place in range(start, stop):
        if sparse and place + AHEAD < stop:
            later = ids[place + AHEAD]
            prefetch_row(table, later)
            prefetch_row(exp_avg, later)
        if _is_zero(rows, place):
            continue
        row = ids[place] if sparse else place
        squares = np.float32(0)
        for d in range(width):
            squares += wide(rows[place, d]) * wide(rows[place, d])
        square = exp_avg_sq[row] + new2 * (squares / np.float32(width) - exp_avg_sq[row])
        exp_avg_sq[row] = square
        scale = size / (np.sqrt(square) + eps)
        first = np.uint32(row * width)
        for d in range(width):
            mean = wide(exp_avg[row, d])
            mean += new1 * (wide(rows[place, d]) - mean)
            bits = _mixed(np.uint32(first + np.uint32(d)) ^ salt)
            table[row, d] = _rounded_by(wide(table[row, d]) - scale * mean, bits & np.uint32(0xFFFF))
            exp_avg[row, d] = _rounded_by(mean, bits >> np.uint32(16))


@inlined
def _mixed(x: Any) -> Any:
    """As in the reference: the finalizer of MurmurHash3."""
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B))  # Numba's products have 64 bits
    x = np.uint32((x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return x ^ (x >> np.uint32(16))


@inlined
def _rounded_by(x: float, bits: int) -> Any:
    """A float32 as the 16 bits of a bfloat16, rounded by 16 random bits; not finite ones as they are."""
    word = bits_of(x)
    finite = (word & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    quiet = np.uint32(0x400000) if x != x else np.uint32(0)
    word = np.uint32(word + np.uint32(bits)) if finite else word | quiet
    return np.int16(word >> np.uint32(16))


FUNCTIONS = TableUpdateFunctions(_full, _rounded)
