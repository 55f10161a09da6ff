"""The gradient of a table that was looked up in, without sorting more than ids and without atomics.

Entries are put in the order of their ids by a stable radix sort; each distinct row is then the sum over one
segment, written once, by one thread.

Legend: `M` entries, `N` rows of the table, `D` width, `U` distinct rows.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from myriad.kernels.cpu.memory import new_tensor
from myriad.kernels.cpu.rows import sum_row
from myriad.kernels.cpu.simd import LINE, array, as_element, compiled, inlined, store_line_past_cache
from myriad.kernels.cpu.threads import in_parallel

DIGIT = 11
"""Bits that one pass of the sort orders by, at most: its counts stay in the nearest cache."""
PAST_CACHE = 2**24
"""Bytes of rows from which they would drive all else out of the cache, and each other."""


class Segments(NamedTuple):
    """Entries in the order of their ids."""

    order_M: np.ndarray
    """int32: entries, those of one id together, in the order in which they stood."""
    starts: np.ndarray
    """int32 of shape (U + 1,): where each distinct id's entries begin, and the end."""
    ids_U: np.ndarray
    """int64, increasing."""


def segments(ids: Tensor, rows: int) -> Segments:
    """Group the entries of a tensor of ids below `rows` by id."""
    return Segments(*grouped(array(ids).reshape(-1), bits_below(rows)))


def bits_below(rows: int) -> int:
    """How many bits the sort needs for ids below `rows`."""
    return max(1, (rows - 1).bit_length())


@compiled
def grouped(ids: Any, bits: int) -> Any:
    """The fields of `Segments` for ids of so many bits, of shape (M,).

    An id and its entry are sorted as one number: nothing is looked up on the way.
    """
    entry_bits = 1
    while 2**entry_bits < len(ids):
        entry_bits += 1
    entries, spare = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
    for entry in range(len(ids)):
        entries[entry] = (ids[entry] << entry_bits) | entry
    passes = -(-bits // DIGIT)
    digit = -(-bits // passes)
    for number in range(passes):
        _sort_by_digit(entries, entry_bits + number * digit, digit, spare)
        entries, spare = spare, entries
    order, starts = np.empty(len(ids), np.int32), np.empty(len(ids) + 1, np.int32)
    distinct = np.empty(len(ids), np.int64)
    found, before = 0, -1
    for place in range(len(ids)):
        value = entries[place] >> entry_bits
        order[place] = entries[place] & (2**entry_bits - 1)
        starts[found], distinct[found] = place, value
        found += value != before
        before = value
    starts[found] = len(ids)
    return order, starts[: found + 1], distinct[:found]


@compiled
def _sort_by_digit(numbers: Any, shift: int, digit: int, target: Any) -> None:
    """Put numbers in the order of some of their bits; those that agree in these stay in theirs."""
    mask = 2**digit - 1
    places = np.zeros(2**digit + 1, np.int32)
    for number in numbers:
        places[((number >> shift) & mask) + 1] += 1
    for value in range(2**digit):
        places[value + 1] += places[value]
    for number in numbers:
        value = (number >> shift) & mask
        target[places[value]] = number
        places[value] += 1


def gradient_rows(table_ND: Tensor, found: Segments, sparse: bool) -> Tensor:
    """The rows of a table's gradient, to be written: (U, D) if sparse, else (N, D), of which the unused are zero."""
    if sparse:
        return new_tensor((len(found.ids_U), table_ND.shape[1]), table_ND.dtype)
    rows = new_tensor(table_ND.shape, table_ND.dtype)
    in_parallel(_fill_gaps, len(rows), found.ids_U, array(rows), past_cache(rows), grain=1024)
    return rows


def bounds_of_pieces(found: Segments, pieces: int) -> np.ndarray:
    """The segments at which a number of pieces of about as many entries each begin and end."""
    entries = np.linspace(0, found.starts[-1], pieces + 1)
    bounds = np.searchsorted(found.starts, entries)
    bounds[-1] = len(found.ids_U)
    return bounds


def table_gradient(
    table_ND: Tensor, found: Segments, coefficients_M: np.ndarray, source_TD: np.ndarray, sparse: bool
) -> Tensor:
    """For every distinct id the sum over its entries of coefficients[m] * source[m // A], A = M / T.

    Returns:
        rows of shape (U, D) if sparse, else of shape (N, D), in the table's dtype.
    """
    rows = gradient_rows(table_ND, found, sparse)
    arguments = (coefficients_M, source_TD, array(rows), sparse, past_cache(rows))
    in_parallel(_sum_segments, len(found.ids_U), *found, *arguments, grain=256)
    return rows


def ids_tensor(found: Segments, sparse: bool) -> Tensor:
    """The distinct ids of a sparse gradient; none for a dense one."""
    return torch.from_numpy(found.ids_U) if sparse else torch.empty(0, dtype=torch.int64)


@compiled
def _fill_gaps(start: int, stop: int, ids: Any, rows: Any, past_cache: bool) -> None:
    """Zero the rows that no id points at."""
    nothing = np.zeros((1, rows.shape[1]), np.float32)
    place = np.searchsorted(ids, start)
    for row in range(start, stop):
        if place < len(ids) and ids[place] == row:
            place += 1
        else:
            write_row(rows, row, nothing, 0, past_cache)


@compiled
def _sum_segments(
    start: int,
    stop: int,
    order: Any,
    starts: Any,
    ids: Any,
    coefficients: Any,
    source: Any,
    rows: Any,
    sparse: bool,
    past_cache: bool,
) -> None:
    active = len(order) // max(1, len(source))
    total = np.empty((1, source.shape[1]), np.float32)
    for segment in range(start, stop):
        for place in range(starts[segment], starts[segment + 1]):
            entry = order[place]
            sum_row(total, coefficients[entry], source, entry // active, place == starts[segment])
        write_row(rows, segment if sparse else ids[segment], total, 0, past_cache)


def past_cache(rows: Tensor) -> bool:
    """Whether rows that are written once, whole, should leave what is in the cache there: they are many."""
    lines = rows.shape[1] * rows.itemsize % LINE == 0 and rows.data_ptr() % LINE == 0
    return lines and rows.nbytes >= PAST_CACHE


@inlined
def write_row(rows: Any, row: int, totals: Any, place: int, past_cache: bool) -> None:
    """rows[row] = totals[place], in the dtype of the rows"""
    width = rows.shape[1]
    if past_cache:
        for first in range(0, width, LINE // rows.itemsize):
            store_line_past_cache(rows, row * width + first, totals, place * width + first)
    else:
        for d in range(width):
            rows[row, d] = as_element(rows, totals[place, d])
