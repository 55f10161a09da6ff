"""The k best of a row of scores: coarse scores choose candidates, exact ones decide among them.

Coarse scores are int16, compared 64 at a time. The k-th largest of the maxima of groups of them is a bound that at
least k reach. These are scored exactly, and the least of them is one that the k best reach: by what a coarse score can
be off, every other that may reach it is scored too. An exact score's rank is the number of those that are larger.

Legend: `B` rows, `S` scores of a row, `G` groups of them, `Q` width of a sub-key.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from myriad.kernels.cpu.simd import (
    FLOAT32,
    INT16,
    INT32,
    INT64,
    bit_count,
    from_ordered,
    in_order,
    inlined,
    intrinsic,
    place_in,
    splat,
    vector,
)

ROWS = 4
"""Rows worked on at a time: as many as hide the latency of one's comparisons behind the others'."""
WORD = 64
"""Coarse scores that are compared at once, and the bits that say how that came out."""
LANES = 16
"""Float32 numbers of a vector."""
BLOCK = 2 * LANES
"""Exact scores that are ranked at once."""
SPARE = BLOCK
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
    end = -(-count // BLOCK) * BLOCK
    numbers[count:end] = -(2**31)
    ranks[:end] = 0
    for block in range(0, end, BLOCK):
        for other in range(0, block, BLOCK):
            _add_reaching(ranks, numbers, block, other)
        _add_ranks_within(ranks, numbers, block)
        for other in range(block + BLOCK, end, BLOCK):
            _add_larger(ranks, numbers, block, other)
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
        query, keys = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 1))
        width = builder.extract_value(query.shape, 0)
        named = builder.load(place_in(context, builder, kinds[2], *arguments[2:4], count=ROWS), align=4)
        rows, totals = [], []
        for lane in range(ROWS):
            row = builder.sext(builder.extract_element(named, INT32(lane)), INT64)
            rows.append(builder.gep(keys.data, [builder.mul(row, width)]))
            totals.append(cgutils.alloca_once_value(builder, vector(FLOAT32, [0.0] * LANES)))

        def add(first: Any, read: Any) -> None:
            mine = read(query.data, first)
            for row, total in zip(rows, totals, strict=True):
                product = builder.fmul(mine, read(row, first), flags=["contract"])  # multiplied and added as one
                builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)

        def whole(data: Any, first: Any) -> Any:
            place = builder.bitcast(builder.gep(data, [first]), ir.VectorType(FLOAT32, LANES).as_pointer())
            return builder.load(place, align=4)

        whole_vectors = builder.udiv(width, INT64(LANES))
        with cgutils.for_range(builder, whole_vectors) as loop:
            add(builder.mul(loop.index, INT64(LANES)), whole)
        first = builder.mul(whole_vectors, INT64(LANES))
        left = builder.sub(width, first)
        with builder.if_then(builder.icmp_unsigned(">", left, INT64(0)), likely=False):
            lanes = vector(INT32, range(LANES))
            there = builder.icmp_unsigned("<", lanes, splat(builder, builder.trunc(left, INT32), LANES))
            add(first, lambda data, first: _masked_load(builder, data, first, there))
        sums = _sums_of_four(builder, [builder.load(total) for total in totals])
        numbers = in_order(builder, builder.bitcast(sums, ir.VectorType(INT32, ROWS)))
        builder.store(numbers, place_in(context, builder, kinds[4], arguments[4], arguments[3], count=ROWS), align=4)
        return context.get_dummy_value()

    return types.none(query, keys, places, types.intp, exact), generate


def _masked_load(builder: Any, data: Any, first: Any, there: Any) -> Any:
    """A vector's first lanes, and zeros: what lies beyond a row may be no memory of ours."""
    lanes = ir.VectorType(FLOAT32, LANES)
    place = builder.bitcast(builder.gep(data, [first]), lanes.as_pointer())
    kind = ir.FunctionType(lanes, [place.type, INT32, there.type, lanes])
    load = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{LANES}f32.p0")
    return builder.call(load, [place, INT32(4), there, vector(FLOAT32, [0.0] * LANES)])


def _sums_of_four(builder: Any, vectors: Any) -> Any:
    """The sum of each of four vectors' lanes."""

    def pick(a: Any, b: Any, lanes: Any) -> Any:
        return builder.shuffle_vector(a, b, vector(INT32, lanes))

    def halved(numbers: Any, count: int) -> Any:
        return builder.fadd(pick(numbers, numbers, range(count)), pick(numbers, numbers, range(count, 2 * count)))

    a, b, c, d = (halved(halved(numbers, 8), 4) for numbers in vectors)
    ab = builder.fadd(pick(a, b, [0, 4, 1, 5]), pick(a, b, [2, 6, 3, 7]))
    cd = builder.fadd(pick(c, d, [0, 4, 1, 5]), pick(c, d, [2, 6, 3, 7]))
    return builder.fadd(pick(ab, cd, [0, 1, 4, 5]), pick(ab, cd, [2, 3, 6, 7]))


def _add_counts(
    context: Any, builder: Any, kinds: Any, ranks: Any, numbers: Any, block: Any, other: Any, counts: Any
) -> None:
    """Add to the ranks of a block's numbers how many of another block's count: counts(x, mine, of, at, lane) says for
    its number x, at lane `lane` of vector `of`, for which of the numbers in vector `at` it does."""
    vectors = range(BLOCK // LANES)

    def vector_at(kind: Any, array: Any, at: int) -> Any:
        return place_in(context, builder, kind, array, builder.add(block, INT64(at * LANES)), count=LANES)

    mine = [builder.load(vector_at(kinds[1], numbers, at), align=4) for at in vectors]
    places = [vector_at(kinds[0], ranks, at) for at in vectors]
    totals = [cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in places]
    data = context.make_array(kinds[1])(context, builder, numbers).data
    for of in vectors:
        with cgutils.for_range(builder, INT64(LANES)) as loop:
            place = builder.add(builder.add(other, INT64(of * LANES)), loop.index)
            x = splat(builder, builder.load(builder.gep(data, [place])), LANES)
            for at, total in zip(vectors, totals, strict=True):
                before = builder.load(total)
                more = builder.add(before, vector(INT32, [1] * LANES))
                builder.store(builder.select(counts(x, mine[at], of, at, loop.index), more, before), total)
    for place, total in zip(places, totals, strict=True):
        builder.store(builder.load(total), place, align=4)


def _adding(comparison: str) -> Any:
    def add(typing: Any, ranks: Any, numbers: Any, block: Any, other: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def counts(x: Any, mine: Any, of: int, at: int, lane: Any) -> Any:
                return builder.icmp_signed(comparison, x, mine)

            ranks, numbers, block, other = arguments
            _add_counts(context, builder, signature.args, ranks, numbers, block, other, counts)
            return context.get_dummy_value()

        return types.none(ranks, numbers, types.intp, types.intp), generate

    return add


_add_larger = intrinsic(_adding(">"))
"""Add to the ranks of a block's numbers how many of a later block's are larger."""
_add_reaching = intrinsic(_adding(">="))
"""The same of an earlier block's that are at least as large."""


@intrinsic
def _add_ranks_within(typing: Any, ranks: Any, numbers: Any, block: Any) -> Any:
    """Add to the ranks of a block's numbers how many others of the block are larger, or as large and before them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def counts(x: Any, mine: Any, of: int, at: int, lane: Any) -> Any:
            if of != at:
                return builder.icmp_signed(">" if at < of else ">=", x, mine)
            later = builder.shl(ir.IntType(LANES)(2**LANES - 2), builder.trunc(lane, ir.IntType(LANES)))
            as_large = builder.icmp_signed(">=", x, mine)
            and_later = builder.and_(as_large, builder.bitcast(later, as_large.type))
            return builder.or_(builder.icmp_signed(">", x, mine), and_later)

        ranks, numbers, block = arguments
        _add_counts(context, builder, signature.args, ranks, numbers, block, block, counts)
        return context.get_dummy_value()

    return types.none(ranks, numbers, types.intp), generate
