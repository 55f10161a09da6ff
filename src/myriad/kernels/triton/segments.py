"""Gradients of tables without atomics: entries sorted by row, each row a segment that one program adds up.

A row that many tokens share would keep one program busy long after the others have ended. So the sorted entries
are cut into chunks of equal size: a segment inside one chunk is added up directly, one that crosses the end of a
chunk in pieces, a piece a chunk, in parallel. A chunk has two pieces at most: of the segment that comes in and of the
one that goes out; the number of pieces is thus known without asking the device.

The gradients of two tables are added up together: with few entries a row, time goes into finding out what they are, not
into adding them up.

Legend: `T` tokens, `A` entries a token, `M` = T A entries, `N` rows of the table, `U` segments, `D` width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from myriad.kernels.triton.launch import TILE, columns_of, launch, warps_of

CHUNK = 1024
"""Sorted entries of a chunk."""
ROW_ENTRIES = 2
"""Entries of a row at once: with more a program needs more registers, so that fewer programs wait side by side."""
LONG_ROW = 256
"""Entries of a row, in the mean, from which a program has several warps for it, as for a piece."""


class Terms(NamedTuple):
    """What is added up for the rows of a table: weights[t, a] * source[t]."""

    weights_TA: Tensor
    source_TD: Tensor
    dtype: torch.dtype
    """Of the sums."""


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
    rows_M, order_M = torch.sort(ids_M.to(narrowest(rows)), stable=True)
    if sparse:
        first = torch.ones(len(ids_M) + 1, dtype=torch.bool, device=ids_M.device)
        torch.ne(rows_M[1:], rows_M[:-1], out=first[1:-1])
        # The last start is the end of all; without entries it is the only one.
        starts = (first if len(ids_M) else first[:1]).nonzero().squeeze(1)
        return Segments(rows_M, order_M, starts, rows_M[starts[:-1]].long(), ids_TA.shape[1])
    every = torch.arange(rows + 1, dtype=rows_M.dtype, device=ids_M.device)
    return Segments(rows_M, order_M, torch.searchsorted(rows_M, every), ids_TA.new_empty(0), ids_TA.shape[1])


def narrowest(rows: int) -> torch.dtype:
    """The smallest integers that hold 0 to `rows`: fewer bits to sort."""
    return torch.int16 if rows < 2**15 else torch.int32 if rows < 2**31 else torch.int64


def segment_sums(found: Segments, *terms: Terms) -> list[Tensor]:
    """For each of one or two terms the sums over every segment's entries, taken in float32, of shape (U, D).

    Args:
        found: of `segments`.
        terms: weights and sources of any floating dtype; sources of one shape.
    """
    first, last = terms[0], terms[-1]  # where there is one only, it stands for the other, which is not read
    entries, count, width = len(found.order_M), len(found.starts) - 1, first.source_TD.shape[1]
    outs = [one.source_TD.new_empty(count, width, dtype=one.dtype) for one in terms]
    chunks = triton.cdiv(entries, CHUNK)
    pieces = first.source_TD.new_empty(len(terms), 2 * chunks, width, dtype=torch.float32)
    columns = columns_of(width)
    tiles = triton.cdiv(width, columns)
    added = [tensor.contiguous() for one in (first, last) for tensor in one[:2]]
    block = TILE // columns // len(terms)
    at_once = block if entries >= LONG_ROW * count else ROW_ENTRIES
    small = max(entries, first.source_TD.numel()) < 2**31
    sizes = {"A": found.entries, "D": width, "CHUNK": CHUNK, "BLOCK_D": columns, "TWO": len(terms) == 2}
    sizes |= {"INDEX": tl.int32 if small else tl.int64}
    launch(
        _piece_sums,
        (2 * chunks, tiles),
        found.order_M,
        *added,
        found.rows_M,
        pieces[0],
        pieces[-1],
        entries,
        **sizes,
        BLOCK_E=block,
        num_warps=warps_of(block * columns * len(terms)),
    )
    launch(
        _row_sums,
        (count, tiles),
        found.order_M,
        *added,
        found.starts,
        pieces[0],
        pieces[-1],
        outs[0],
        outs[-1],
        **sizes,
        BLOCK_E=at_once,
        num_warps=warps_of(at_once * columns * len(terms)),
    )
    return outs


@triton.jit
def _entry_sums(
    order,
    weights,
    source,
    more_weights,
    more_source,
    begin,
    end,
    column,
    A: tl.constexpr,
    D: tl.constexpr,
    TWO: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sums over sorted entries [begin, end) of weight * source, in some columns, for the one and the other term."""
    sums = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    more_sums = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        exists = place < end
        # Beyond the end stands the last entry, without weight: masked loads would cost more than adding does.
        entry = tl.load(order + tl.minimum(place, end - 1)).to(INDEX)
        places = (entry // A)[:, None] * D + column[None, :]
        sums += _weighted(weights, source, entry, places, exists, column, D, BLOCK_D)
        if TWO:
            more_sums += _weighted(more_weights, more_source, entry, places, exists, column, D, BLOCK_D)
    return tl.sum(sums, 0), tl.sum(more_sums, 0)


@triton.jit
def _weighted(weights, source, entry, places, exists, column, D: tl.constexpr, BLOCK_D: tl.constexpr):
    weight = tl.where(exists, tl.load(weights + entry).to(tl.float32), 0.0)
    if D % BLOCK_D == 0:
        rows = tl.load(source + places)
    else:
        rows = tl.load(source + places, mask=(column < D)[None, :], other=0.0)
    return weight[:, None] * rows.to(tl.float32)


@triton.jit(do_not_specialize=["entries"])  # no kernel is compiled anew for another number of tokens
def _piece_sums(
    order,
    weights,
    source,
    more_weights,
    more_source,
    rows,
    pieces,
    more_pieces,
    entries,
    A: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    TWO: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pieces[2 c] is chunk c's part of the segment that comes in from chunk c - 1; pieces[2 c + 1] that of one which
    starts in it and goes on into chunk c + 1."""
    piece = tl.program_id(0).to(tl.int64)
    goes_out = piece % 2
    first = (piece // 2 * CHUNK).to(INDEX)
    last = tl.minimum(first + CHUNK, entries).to(INDEX)
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
        terms = (order, weights, source, more_weights, more_source)
        sums, more_sums = _entry_sums(*terms, begin, end, column, A, D, TWO, INDEX, BLOCK_E, BLOCK_D)
        tl.store(pieces + piece * D + column, sums, mask=column < D)
        if TWO:
            tl.store(more_pieces + piece * D + column, more_sums, mask=column < D)


@triton.jit
def _row_sums(
    order,
    weights,
    source,
    more_weights,
    more_source,
    starts,
    pieces,
    more_pieces,
    out,
    more_out,
    A: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    TWO: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    begin = tl.load(starts + segment).to(INDEX)
    end = tl.load(starts + segment + 1).to(INDEX)
    first = begin // CHUNK
    last = tl.maximum(end - 1, begin) // CHUNK
    if first == last:
        terms = (order, weights, source, more_weights, more_source)
        sums, more_sums = _entry_sums(*terms, begin, end, column, A, D, TWO, INDEX, BLOCK_E, BLOCK_D)
    else:
        sums = _sum_of_pieces(pieces, first, last, column, D, BLOCK_E, BLOCK_D)
        more_sums = sums
        if TWO:
            more_sums = _sum_of_pieces(more_pieces, first, last, column, D, BLOCK_E, BLOCK_D)
    tl.store(out + segment * D + column, sums.to(out.dtype.element_ty), mask=inside)
    if TWO:
        tl.store(more_out + segment * D + column, more_sums.to(more_out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_of_pieces(pieces, first, last, column, D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of a segment from chunk `first` to chunk `last`."""
    inside = column < D
    pieces += column
    sums = tl.load(pieces + (2 * first + 1).to(tl.int64) * D, mask=inside, other=0.0)
    parts = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(first + 1, last + 1, BLOCK_E):
        chunk = (start + tl.arange(0, BLOCK_E)).to(tl.int64)
        mask = (chunk <= last)[:, None] & inside[None, :]
        parts += tl.load(pieces[None, :] + (2 * chunk)[:, None] * D, mask=mask, other=0.0)
    return sums + tl.sum(parts, 0)
