"""The k best of a row of scores: coarse scores choose candidates, exact ones decide among them.

Coarse scores are int16, compared 64 at a time. The k-th largest of the maxima of groups of them is a bound that at
least k reach. These are scored exactly, and the least of them is one that the k best reach: by what a coarse score can
be off, every other that may reach it is scored too. An exact score's rank is the number of those that are larger.

Legend: `B` rows, `S` scores of a row, `G` groups of them, `Q` width of a sub-key.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from myriad.kernels.cpu.rows import ROWS, Rows, dots_of
from myriad.kernels.cpu.simd import (
    INT16,
    INT32,
    INT64,
    LANES,
    bit_count,
    from_ordered,
    in_order,
    inlined,
    intrinsic,
    place_in,
    splat,
    vector,
)

WORD = 64
"""Coarse scores that are compared at once, and the bits that say how that came out."""
SPARE = LANES
"""Places beyond the last number of a buffer that may be written."""
LOWEST, HIGHEST = -(2**15), 2**15 - 1
"""What no coarse score is: what fills the last word, and a bound that none reaches."""
GROUPS_PER_WINNER = 4
"""Groups of scores for each one chosen: more give a closer bound, fewer less to compare."""


@inlined
def groups(side: int, k: int) -> int:
    """How many groups a row of scores has: whole words."""
    return min(-(-side // WORD), -(-GROUPS_PER_WINNER * k // WORD)) * WORD


@inlined
def bounds(coarse_BS: Any, rows: int, k: int, maxima_BG: Any, bounds_B: Any) -> None:
    """For each row the k-th largest of its groups' maxima: by bisection, bit by bit, all rows at a time."""
    number = maxima_BG.shape[1]
    for row in range(rows):
        for first in range(0, number, WORD):
            _keep_largest(maxima_BG[row], first, coarse_BS[row], number)
        bounds_B[row] = LOWEST
    for bit in range(15, -1, -1):
        for row in range(rows):
            higher, count = bounds_B[row] + (1 << bit), 0
            for first in range(0, number, WORD):
                count += bit_count(_reaching(maxima_BG[row], first, higher))
            bounds_B[row] = higher if count >= k else bounds_B[row]


@inlined
def first_candidates(
    coarse_S: Any, bound: int, is_bounded: bool, query_Q: Any, keys_SQ: Any, words: Any, found: Any
) -> Any:
    """Those that reach the bound: how many, their places, and their exact scores as integers of the same order.

    All are candidates where there is no bound.
    """
    places, exact = found
    if is_bounded:
        count = _collect(coarse_S, bound, HIGHEST, words, places, 0)
    else:
        count = len(keys_SQ)
        for place in range(count):
            places[place] = place
    _score(query_Q, keys_SQ, places, 0, count, exact)
    return count


@inlined
def more_candidates(
    coarse_S: Any,
    bound: int,
    steps: float,
    error: float,
    query_Q: Any,
    keys_SQ: Any,
    words: Any,
    found: Any,
    first: int,
) -> Any:
    """The same with those below the bound that may reach the least exact score found so far.

    `steps` are those of a coarse score to a unit of exact ones, and `error` bounds how far the two are apart.
    """
    places, exact = found
    if first == len(keys_SQ):
        return first
    least = exact[0]
    for place in range(1, first):
        least = min(least, exact[place])
    reached = max((from_ordered(least) - error) * steps, np.float32(LOWEST))
    count = _collect(coarse_S, max(np.int64(np.floor(reached)) - 1, LOWEST + 1), bound, words, places, first)
    _score(query_Q, keys_SQ, places, first, count, exact)
    return count


@inlined
def rank(numbers: Any, count: int, ranks: Any, order: Any) -> None:
    """Fill `order` with the places of int32 numbers, the largest first and equal ones as they stand."""
    end = -(-count // LANES) * LANES
    numbers[count:end] = -(2**31)
    for block in range(0, end, LANES):
        _rank(numbers, count, block, ranks)
    for place in range(count):
        order[ranks[place]] = place


@inlined
def _collect(coarse_S: Any, least: int, below: int, words: Any, places: Any, count: int) -> Any:
    """Append the places of coarse scores that reach one bound and not the other; how many there are then.

    A word's first three places are taken whether they are there or not: the processor has less to guess.
    """
    for word in range(len(words)):
        words[word] = _reaching(coarse_S, word * WORD, least) & ~_reaching(coarse_S, word * WORD, below)
    for word in range(len(words)):
        bits, place = words[word], count
        count += bit_count(bits)
        while True:
            for _ in range(3):
                places[place] = word * WORD + _lowest_bit(bits)
                place += 1
                bits &= bits - np.uint64(1)
            if bits == np.uint64(0):
                break
    return count


@inlined
def _score(query_Q: Any, keys_SQ: Any, places: Any, first: int, stop: int, exact: Any) -> None:
    places[stop : stop + ROWS] = 0
    for place in range(first, stop, ROWS):
        _score_four(query_Q, keys_SQ, places, place, exact)


@intrinsic
def _keep_largest(typing: Any, maxima: Any, first: Any, numbers: Any, stride: Any) -> Any:
    """The largest of int16 numbers a stride apart, 64 side by side, from `first` on to the end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, (maxima, first, numbers, stride) = signature.args, arguments
        end = builder.extract_value(context.make_array(kinds[2])(context, builder, numbers).shape, 0)
        lowest = vector(INT16, [LOWEST] * WORD)
        largest = cgutils.alloca_once_value(builder, lowest)
        with cgutils.for_range_slice(builder, first, end, stride, inc=True) as (place, _):
            new = builder.load(place_in(context, builder, kinds[2], numbers, place, count=WORD), align=2)
            old = builder.load(largest)
            builder.store(builder.select(builder.icmp_signed(">", new, old), new, old), largest)
        builder.store(builder.load(largest), place_in(context, builder, kinds[0], maxima, first, count=WORD), align=2)
        return context.get_dummy_value()

    return types.none(maxima, types.intp, numbers, types.intp), generate


@intrinsic
def _reaching(typing: Any, numbers: Any, first: Any, bound: Any) -> Any:
    """The bits of those of 64 int16, from `first` on, that are at least the bound."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        mine = builder.load(place_in(context, builder, signature.args[0], *arguments[:2], count=WORD), align=2)
        bound = splat(builder, builder.trunc(arguments[2], INT16), WORD)
        return builder.bitcast(builder.icmp_signed(">=", mine, bound), INT64)

    return types.uint64(numbers, types.intp, types.int64), generate


@intrinsic
def _lowest_bit(typing: Any, bits: Any) -> Any:
    """The number of the lowest set bit of a uint64; 64 of zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(0))

    return types.intp(types.uint64), generate


@intrinsic
def _score_four(typing: Any, query: Any, keys: Any, places: Any, first: Any, exact: Any) -> Any:
    """The dot products of a float32 query with the four rows of `keys` that places[first :] names, in order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        query = context.make_array(kinds[0])(context, builder, arguments[0]).data
        keys = Rows(context, builder, kinds[1], arguments[1])
        named = builder.load(place_in(context, builder, kinds[2], *arguments[2:4], count=ROWS), align=4)
        named = [builder.sext(builder.extract_element(named, INT32(lane)), INT64) for lane in range(ROWS)]
        sums = dots_of(builder, query, [keys.at(row) for row in named], keys.width)
        numbers = in_order(builder, builder.bitcast(sums, ir.VectorType(INT32, ROWS)))
        builder.store(numbers, place_in(context, builder, kinds[4], arguments[4], arguments[3], count=ROWS), align=4)
        return context.get_dummy_value()

    return types.none(query, keys, places, types.intp, exact), generate


@intrinsic
def _rank(typing: Any, numbers: Any, count: Any, block: Any, ranks: Any) -> Any:
    """For 16 of `count` int32, from `block` on, how many of all are larger, or as large and before them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, (numbers, count, block, ranks) = signature.args, arguments
        mine = builder.load(place_in(context, builder, kinds[0], numbers, block, count=LANES), align=4)
        data = context.make_array(kinds[0])(context, builder, numbers).data
        total = cgutils.alloca_once_value(builder, vector(INT32, [0] * LANES))
        after = builder.add(block, INT64(LANES))

        def add(start: Any, stop: Any, counts: Callable[[Any, Any], Any]) -> None:
            with cgutils.for_range_slice(builder, start, stop, INT64(1), inc=True) as (place, _):
                x = splat(builder, builder.load(builder.gep(data, [place])), LANES)
                before = builder.load(total)
                more = builder.add(before, vector(INT32, [1] * LANES))
                builder.store(builder.select(counts(x, place), more, before), total)

        def counts_within(x: Any, place: Any) -> Any:
            lane = builder.trunc(builder.sub(place, block), ir.IntType(LANES))
            later = builder.shl(ir.IntType(LANES)(2**LANES - 2), lane)
            as_large = builder.icmp_signed(">=", x, mine)
            and_later = builder.and_(as_large, builder.bitcast(later, as_large.type))
            return builder.or_(builder.icmp_signed(">", x, mine), and_later)

        add(INT64(0), block, lambda x, place: builder.icmp_signed(">=", x, mine))
        add(block, after, counts_within)
        add(after, count, lambda x, place: builder.icmp_signed(">", x, mine))
        builder.store(builder.load(total), place_in(context, builder, kinds[3], ranks, block, count=LANES), align=4)
        return context.get_dummy_value()

    return types.none(numbers, types.intp, types.intp, ranks), generate
