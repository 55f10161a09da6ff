"""The k best sums of a score of one half and one of the other, each half's best being known.

The pair of the a-th and the b-th best, counted from one, has a b - 1 others that are at least as good: only pairs with
a b <= k can be among the k best. Of those with a b <= n, where n is such that they are k at least, none has a smaller
sum than the least; what is below that is left out, too. Of 50 pairs for k = 16 some 30 remain.

Legend: `P` = 2 halves, `K` kept of each half.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from myriad.kernels.cpu.selection import rank
from myriad.kernels.cpu.simd import (
    INT32,
    INT64,
    LANES,
    LARGEST,
    compiled,
    from_ordered,
    in_order,
    inlined,
    intrinsic,
    ordered,
    place_in,
    splat,
    vector,
)


@compiled
def partners(k: int, kept: int) -> Any:
    """For each of a half's `kept` best with how many of the other's it may be a pair among the k best, int64; and with
    how many it is one of k pairs at least of which none is worse than the last of these."""
    product = 1
    while _number(product, kept) < k:
        product += 1
    possible_K, certain_K = np.empty(kept, np.int64), np.empty(kept, np.int64)
    for first in range(kept):
        possible_K[first] = min(k // (first + 1), kept)
        certain_K[first] = min(product // (first + 1), kept)
    return possible_K, certain_K


@compiled
def _number(product: int, kept: int) -> int:
    """How many pairs of ranks up to `kept` have a product of at most this."""
    count = 0
    for first in range(min(product, kept)):
        count += min(product // (first + 1), kept)
    return count


@inlined
def best_pairs(
    winners_PK: Any, sub_keys_PK: Any, partners_2K: Any, side: int, numbers: Any, scores_K: Any, ids_K: Any
) -> None:
    """The best sums, best first, and their experts.

    Args:
        winners_PK: float32, each half's best scores, best first, and `SPARE` numbers more.
        partners_2K: what `partners` returns.
        numbers: int32 of room for all pairs: sums, which first and which second score, ranks and order.
    """
    sums, firsts, seconds, ranks, order = numbers
    possible_K, certain_K = partners_2K
    least = np.int32(LARGEST)
    for first in range(len(certain_K)):
        if certain_K[first] == 0:
            break
        least = min(least, ordered(winners_PK[0, first] + winners_PK[1, certain_K[first] - 1]))
    count = _add_up(winners_PK, possible_K, least, sums, firsts, seconds)
    if count < len(scores_K):  # infinities of both signs have sums in no order
        count = _add_up(winners_PK, possible_K, np.int32(-LARGEST - 1), sums, firsts, seconds)
    rank(sums, count, ranks, order)
    for best in range(len(scores_K)):
        chosen = order[best]
        scores_K[best] = from_ordered(sums[chosen])
        sub_key = np.int64(sub_keys_PK[0, firsts[chosen]])
        ids_K[best] = sub_key * side + sub_keys_PK[1, seconds[chosen]]


@inlined
def _add_up(winners_PK: Any, possible_K: Any, least: int, sums: Any, firsts: Any, seconds: Any) -> Any:
    """Collect the sums that reach the least; how many there are."""
    count = 0
    for first in range(len(possible_K)):
        before = count
        for second in range(0, possible_K[first], LANES):
            lanes = min(possible_K[first] - second, LANES)
            count += _add_to_lanes(winners_PK, first, second, lanes, least, sums, firsts, seconds, count)
        if count == before:
            break
    return count


@intrinsic
def _add_to_lanes(
    typing: Any,
    winners: Any,
    first: Any,
    second: Any,
    lanes: Any,
    least: Any,
    sums: Any,
    firsts: Any,
    seconds: Any,
    place: Any,
) -> Any:
    """Sums of a first score and 16 second ones as integers of the same order, and which they are of, from a place on.

    So many lanes are wanted. Returns how many there are up to the last that reaches the least; the next call overwrites
    the others.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        winners, first, second, lanes, least, *_, place = arguments
        table = context.make_array(kinds[0])(context, builder, winners)
        width = builder.extract_value(table.shape, 1)
        mine = builder.load(builder.gep(table.data, [first]))
        theirs = place_in(context, builder, kinds[0], winners, builder.add(width, second), count=LANES)
        added = builder.fadd(splat(builder, mine, LANES), builder.load(theirs, align=4))
        numbers = in_order(builder, builder.bitcast(added, ir.VectorType(INT32, LANES)))
        counting = vector(INT32, range(LANES))
        which = splat(builder, builder.trunc(first, INT32), LANES)
        other = builder.add(splat(builder, builder.trunc(second, INT32), LANES), counting)
        for position, written in ((5, numbers), (6, which), (7, other)):
            target = place_in(context, builder, kinds[position], arguments[position], place, count=LANES)
            builder.store(written, target, align=4)
        wanted = builder.icmp_signed("<", counting, splat(builder, builder.trunc(lanes, INT32), LANES))
        reaching = builder.icmp_signed(">=", numbers, splat(builder, least, LANES))
        bits = builder.bitcast(builder.and_(wanted, reaching), ir.IntType(LANES))
        return builder.sub(INT64(LANES), builder.zext(builder.ctlz(bits, ir.IntType(1)(0)), INT64))

    places = (types.intp, types.intp, types.intp, types.int32)
    return types.intp(winners, *places, sums, firsts, seconds, types.intp), generate
