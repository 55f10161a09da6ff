"""Gradients of tables without atomics: entries sorted by row, each row a segment that one program adds up.

A row that many tokens share would keep one program busy long after the others have ended. So the sorted entries
are cut into chunks of equal size: a segment inside one chunk is added up directly, one that crosses the end of a
chunk in pieces, a piece a chunk, in parallel. A chunk has two pieces at most: of the segment that comes in and of the
one that goes out; the number of pieces is thus known without asking the device.

Legend: `T` tokens, `A` entries a token, `M` = T A entries, `N` rows of the table, `U` segments, `D` width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from myriad.kernels.triton.launch import TILE, columns_of, launch, warps_of

CHUNK = 512
"""Sorted entries of a chunk."""


class Segments(NamedTuple):
    """Entries (t, a) sorted by the row that they look up, in the order of tokens where rows are equal."""

    rows_M: Tensor
    """The rows, increasing."""
    order_M: Tensor
    """int64: the entries' places in (T, A)."""
    starts: Tensor
    """int64 of shape (U + 1,): where segments start in the order, and M."""
    ids_U: Tensor
    """int64: the segments' rows, increasing; empty where segments are all N rows of the table."""
    entries: int
    """Entries a token."""


def segments(ids_TA: Tensor, rows: int, sparse: bool) -> Segments:
    """Sort entries by row: a segment for each distinct row, or, where not sparse, for each of so many rows.

    Only the sparse form waits for the device, once: for the number of distinct rows.
    """
    ids_M = ids_TA.reshape(-1)
    rows_M, order_M = torch.sort(ids_M.to(_narrowest(rows)), stable=True)
    if sparse:
        first = torch.ones(len(ids_M) + 1, dtype=torch.bool, device=ids_M.device)
        torch.ne(rows_M[1:], rows_M[:-1], out=first[1:-1])
        # The last start is the end of all; without entries it is the only one.
        starts = (first if len(ids_M) else first[:1]).nonzero().squeeze(1)
        return Segments(rows_M, order_M, starts, rows_M[starts[:-1]].long(), ids_TA.shape[1])
    every = torch.arange(rows + 1, dtype=rows_M.dtype, device=ids_M.device)
    return Segments(rows_M, order_M, torch.searchsorted(rows_M, every), ids_TA.new_empty(0), ids_TA.shape[1])


def _narrowest(rows: int) -> torch.dtype:
    """The smallest integers that hold 0 to `rows`: fewer bits to sort."""
    return torch.int16 if rows < 2**15 else torch.int32 if rows < 2**31 else torch.int64


def segment_sums(found: Segments, weights_TA: Tensor, source_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """For each segment the sum over its entries of weights[t, a] * source[t], taken in float32.

    Args:
        found: of `segments`.
        weights_TA, source_TD: of any floating dtype.
        dtype: of the result, of shape (U, D).
    """
    entries, count, width = len(found.order_M), len(found.starts) - 1, source_TD.shape[1]
    out_UD = torch.empty(count, width, dtype=dtype, device=source_TD.device)
    chunks = triton.cdiv(entries, CHUNK)
    pieces = torch.empty(2 * chunks, width, dtype=torch.float32, device=source_TD.device)
    columns = columns_of(width)
    tiles = triton.cdiv(width, columns)
    inputs = (found.order_M, weights_TA.contiguous(), source_TD.contiguous(), found.rows_M)
    block = TILE // columns
    sizes = {"A": found.entries, "D": width, "CHUNK": CHUNK, "BLOCK_D": columns}
    launch(
        _piece_sums,
        (2 * chunks, tiles),
        *inputs,
        pieces,
        entries,
        **sizes,
        BLOCK_E=block,
        num_warps=warps_of(block * columns),
    )
    # A block holds a segment of mean length: a larger one would mostly be masked.
    block = min(block, max(2, triton.next_power_of_2(triton.cdiv(entries, max(count, 1)))))
    launch(
        _row_sums,
        (count, tiles),
        *inputs[:3],
        found.starts,
        pieces,
        out_UD,
        **sizes,
        BLOCK_E=block,
        num_warps=warps_of(block * columns),
    )
    return out_UD


@triton.jit
def _entry_sums(
    order,
    weights,
    source,
    begin,
    end,
    column,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum over sorted entries [begin, end) of weight * source, in some columns."""
    sums = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        exists = place < end
        entry = tl.load(order + place, mask=exists, other=0)
        weight = tl.load(weights + entry, mask=exists, other=0.0).to(tl.float32)
        mask = exists[:, None] & (column < D)[None, :]
        numbers = tl.load(source + (entry // A)[:, None] * D + column[None, :], mask=mask, other=0.0)
        sums += weight[:, None] * numbers.to(tl.float32)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["entries"])  # no kernel is compiled anew for another number of tokens
def _piece_sums(
    order,
    weights,
    source,
    rows,
    pieces,
    entries,
    A: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pieces[2 c] is chunk c's part of the segment that comes in from chunk c - 1; pieces[2 c + 1] that of one which
    starts in it and goes on into chunk c + 1."""
    piece = tl.program_id(0).to(tl.int64)
    goes_out = piece % 2
    first = piece // 2 * CHUNK
    last = tl.minimum(first + CHUNK, entries)
    place = first + tl.arange(0, CHUNK)
    there = tl.load(rows + place, mask=place < last, other=-1)
    if goes_out:
        row = tl.load(rows + last - 1)
    else:
        row = tl.load(rows + first)
    length = tl.sum((there == row).to(tl.int32), 0)
    comes_in = tl.load(rows + first - 1, mask=first > 0, other=-1) == row
    goes_on = tl.load(rows + last, mask=last < entries, other=-1) == row
    if goes_out:
        begin, end = last - length, last
        wanted = goes_on & ((begin > first) | (comes_in == 0))
    else:
        begin, end = first, first + length
        wanted = comes_in
    if wanted:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        sums = _entry_sums(order, weights, source, begin, end, column, A, D, BLOCK_E, BLOCK_D)
        tl.store(pieces + piece * D + column, sums, mask=column < D)


@triton.jit
def _row_sums(
    order,
    weights,
    source,
    starts,
    pieces,
    out,
    A: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    begin = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    first = begin // CHUNK
    last = tl.maximum(end - 1, begin) // CHUNK
    if first == last:
        sums = _entry_sums(order, weights, source, begin, end, column, A, D, BLOCK_E, BLOCK_D)
    else:
        sums = tl.load(pieces + (2 * first + 1) * D + column, mask=inside, other=0.0)
        parts = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        for start in range(first + 1, last + 1, BLOCK_E):
            chunk = start + tl.arange(0, BLOCK_E)
            mask = (chunk <= last)[:, None] & inside[None, :]
            parts += tl.load(pieces + (2 * chunk)[:, None] * D + column[None, :], mask=mask, other=0.0)
        sums += tl.sum(parts, 0)
    tl.store(out + segment * D + column, sums.to(out.dtype.element_ty), mask=inside)
