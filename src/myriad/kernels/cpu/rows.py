"""What the lookups do with a row of a table."""

from typing import Any

import numpy as np

from myriad.kernels.cpu.simd import inlined, wide

AHEAD = 4
"""Rows that are on their way while one is computed with."""
GRAIN = 8
"""Tokens worth a thread of their own."""


@inlined
def dot(x: Any, token: int, table: Any, row: int) -> Any:
    """x[token] . table[row]"""
    total = np.float32(0)
    for d in range(x.shape[1]):
        total += x[token, d] * wide(table[row, d])
    return total


@inlined
def add_row(totals: Any, place: int, coefficient: float, table: Any, row: int) -> None:
    """totals[place] += coefficient * table[row]"""
    for d in range(totals.shape[1]):
        totals[place, d] += coefficient * wide(table[row, d])
