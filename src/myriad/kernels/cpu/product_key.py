"""Exact product-key retrieval: cheap scores choose candidates, exact ones choose among them.

For a block of tokens the scores of all sub-keys come from one matrix product, in bfloat16 where that is fast.
Tokens lie along the vector lanes, so that a threshold for a whole group of tokens costs a few minima and maxima:
the k-th largest of the maxima of groups of sub-keys, which at least k scores reach. Every score that could belong
to the k best in exact arithmetic, by a bound on the rounding of that token's products, becomes a candidate and is
scored again in float32. Tokens whose bound is not a number, or that leave too many candidates, are scored whole.

Legend: `T` tokens, `H` heads, `P` = 2 halves, `Q` width of a half, `S` sub-keys, `K` retrieved, `B` rows of a block.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from myriad.kernels.cpu.memory import new_tensor
from myriad.kernels.cpu.rows import GRAIN, add_row
from myriad.kernels.cpu.simd import (
    array,
    as_element,
    compiled,
    from_ordered,
    inlined,
    lanes_reaching,
    larger,
    lowest_bit,
    ordered,
    prefetch,
    smaller,
    wide,
)
from myriad.kernels.cpu.table_gradient import segments, table_gradient
from myriad.kernels.cpu.threads import in_parallel
from myriad.kernels.hardware import multiplies_bfloat16_fast
from myriad.kernels.product_key import ProductKeyFunctions, candidate_pairs

SCORES_PER_BLOCK = 2**22
"""Sub-key scores held at once: 8 MB in bfloat16, which a block's selection finds in the cache."""
SCREENING_PAYS = 2**22
"""Multiplications of a call from which bfloat16 products save more than their rounding costs."""
LANES = 64
"""Tokens that are compared at once: their bits fill a word."""
GROUPS_PER_WINNER = 4
"""Groups of sub-keys for each one retrieved: more give a closer threshold, fewer less to compare."""
AHEAD = 8
"""Sub-keys whose scores are on their way from the cache."""
HALF_DIGIT = 2.0**-8
"""The largest relative error of a number rounded to bfloat16."""
EPSILON = 2.0**-24
"""The same for float32."""


def _forward(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    tokens, heads, _, width = queries.shape
    side = keys.shape[2]
    scores_HTK = torch.empty(heads, tokens, k)
    ids_HTK = torch.empty(heads, tokens, k, dtype=torch.int64)
    queries_HTPQ = queries.detach().float().transpose(0, 1).contiguous()
    keys_HPSQ = keys.detach().float().contiguous()
    screens = multiplies_bfloat16_fast("cpu") and 2 * tokens * heads * side * width >= SCREENING_PAYS
    rough_queries = queries_HTPQ.bfloat16() if screens else queries_HTPQ
    rough_keys = keys_HPSQ.bfloat16() if screens else keys_HPSQ
    pairs_2M = _pairs(k, side)
    norms_HP2 = _norms(keys_HPSQ.numpy(), array(rough_keys)) if screens else np.zeros((heads, 2, 2), np.float32)
    # Custom ops run under the caller's autocast, which would round the float32 products.
    with torch.autocast("cpu", enabled=False):
        for some, start, stop in _blocks(heads, tokens, side):
            block = rough_queries[some, start:stop].permute(0, 2, 3, 1)
            scores_HPSB = new_tensor((len(block), 2, side, stop - start), rough_keys.dtype)
            torch.matmul(rough_keys[some], block, out=scores_HPSB)
            in_parallel(
                _retrieve,
                len(block) * -(-(stop - start) // LANES),
                start,
                array(scores_HPSB),
                array(rough_queries[some]),
                queries_HTPQ[some].numpy(),
                keys_HPSQ[some].numpy(),
                norms_HP2[some],
                pairs_2M,
                scores_HTK[some].numpy(),
                ids_HTK[some].numpy(),
                grain=1,
            )
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    return scores_HTK.transpose(0, 1).to(dtype).contiguous(), ids_HTK.transpose(0, 1).contiguous()


def _blocks(heads: int, tokens: int, side: int) -> Iterator[tuple[slice, int, int]]:
    """Heads, and the first and last token: as many tokens as may be, since each head's sub-keys are read for each of
    its blocks."""
    step = max(1, min(tokens, SCORES_PER_BLOCK // (2 * side))) + LANES - 1
    step -= step % LANES
    together = max(1, SCORES_PER_BLOCK // (2 * side * step))
    for head in range(0, heads, together):
        for start in range(0, tokens, step):
            yield slice(head, head + together), start, min(start + step, tokens)


@cache
def _pairs(k: int, side: int) -> np.ndarray:
    """Ranks in the two sorted halves that can be among the k best sums, shape (2, M)."""
    return torch.stack(candidate_pairs(k, side, torch.device("cpu"))).numpy()


@compiled
def _norms(exact_HPSQ: Any, rough_HPSQ: Any) -> Any:
    """For each head and half the largest norm of a sub-key, and of what its rounding changed; shape (H, 2, 2)."""
    largest = np.zeros((len(exact_HPSQ), 2, 2), np.float32)
    for head in range(len(exact_HPSQ)):
        for half in range(2):
            for key in range(exact_HPSQ.shape[2]):
                found = _norm_and_error(exact_HPSQ[head, half, key], rough_HPSQ[head, half, key])
                for place in range(2):
                    if not found[place] <= largest[head, half, place]:  # NaN too
                        largest[head, half, place] = found[place]
    return largest


@inlined
def _norm_and_error(exact: Any, rough: Any) -> Any:
    norm = error = np.float32(0)
    for d in range(len(exact)):
        change = exact[d] - wide(rough[d])
        norm += exact[d] * exact[d]
        error += change * change
    return np.sqrt(norm), np.sqrt(error)


@compiled
def _retrieve(
    start: int,
    stop: int,
    offset: int,
    rough_HPSB: Any,
    rough_queries_HTPQ: Any,
    queries_HTPQ: Any,
    keys_HPSQ: Any,
    norms_HP2: Any,
    pairs_2M: Any,
    scores_HTK: Any,
    ids_HTK: Any,
) -> None:
    """Groups of tokens of one head each, of a block that begins at token `offset`."""
    side, k, block = keys_HPSQ.shape[2], scores_HTK.shape[2], rough_HPSB.shape[3]
    kept = min(k, side)
    size = max(1, side // (GROUPS_PER_WINNER * kept))
    ordered_SL = np.empty((side, LANES), _integers(rough_HPSB))
    maxima_GL = np.empty((-(-side // size), LANES), ordered_SL.dtype)
    largest_KL = np.empty((kept, LANES), ordered_SL.dtype)
    least_L = np.empty(LANES, ordered_SL.dtype)
    candidates_SL = np.empty((side, LANES), np.int32)
    scores_SL = np.empty((side, LANES), np.float32)
    winners_PKL = np.empty((2, kept, LANES), np.float32)
    sub_keys_PKL = np.empty((2, kept, LANES), np.int32)
    sums_KL = np.empty((k, LANES), np.float32)
    places_KL = np.empty((k, LANES), np.int32)
    groups = -(-block // LANES)
    for unit in range(start, stop):
        head, first = unit // groups, unit % groups * LANES
        lanes = min(LANES, block - first)
        token = offset + first
        queries_LPQ = queries_HTPQ[head, token : token + lanes]
        rough_queries_LPQ = rough_queries_HTPQ[head, token : token + lanes]
        for half in range(2):
            _order(rough_HPSB[head, half], first, lanes, size, ordered_SL, maxima_GL)
            _largest(maxima_GL, largest_KL)
            least_L[:] = -1 - _lowest(least_L)  # beyond all
            for lane in range(lanes):
                slack = _slack(queries_LPQ[lane, half], rough_queries_LPQ[lane, half], norms_HP2[head, half])
                least_L[lane] = _least(rough_HPSB, from_ordered(largest_KL[kept - 1, lane]), slack)
            count = _choose(ordered_SL, least_L, candidates_SL, scores_SL)
            _score(candidates_SL[:count], queries_LPQ, half, keys_HPSQ[head, half], scores_SL)
            _clear(winners_PKL[half], sub_keys_PKL[half])
            for number in range(count):
                _insert(scores_SL[number], candidates_SL[number], 0, winners_PKL[half], sub_keys_PKL[half])
        _clear(sums_KL, places_KL)
        for number in range(pairs_2M.shape[1]):
            one, other = pairs_2M[0, number], pairs_2M[1, number]
            for lane in range(LANES):
                scores_SL[0, lane] = winners_PKL[0, one, lane] + winners_PKL[1, other, lane]
                candidates_SL[0, lane] = number
            # So many others are at least as large, and have been inserted.
            _insert(scores_SL[0], candidates_SL[0], (one + 1) * (other + 1) - 1, sums_KL, places_KL)
        for lane in range(lanes):
            for place in range(k):
                pair = places_KL[place, lane]
                scores_HTK[head, token + lane, place] = sums_KL[place, lane]
                sub_key = np.int64(sub_keys_PKL[0, pairs_2M[0, pair], lane])
                ids_HTK[head, token + lane, place] = sub_key * side + sub_keys_PKL[1, pairs_2M[1, pair], lane]


@inlined
def _lowest(numbers: Any) -> Any:
    """The lowest integer that an array can hold."""
    return -(1 << (8 * numbers.itemsize - 1))


@inlined
def _order(rough_SB: Any, first: int, lanes: int, size: int, ordered_SL: Any, maxima_GL: Any) -> None:
    """Scores as integers of the same order, and the largest of each group of sub-keys; lanes without a token have
    the least of all."""
    if lanes < LANES:
        ordered_SL[:] = _lowest(ordered_SL)
    maxima_GL[:] = _lowest(maxima_GL)
    for group in range(len(maxima_GL)):
        maxima = maxima_GL[group]
        for key in range(group * size, min(group * size + size, len(ordered_SL))):
            if key + AHEAD < len(ordered_SL):
                prefetch(rough_SB[key + AHEAD], first, lanes)
            scores, numbers = rough_SB[key][first : first + lanes], ordered_SL[key]
            if lanes == LANES:  # a number known beforehand
                for lane in range(LANES):
                    numbers[lane] = ordered(scores[lane])
            else:
                for lane in range(lanes):
                    numbers[lane] = ordered(scores[lane])
            for lane in range(LANES):
                maxima[lane] = larger(maxima[lane], numbers[lane])


@inlined
def _largest(values_GL: Any, largest_KL: Any) -> None:
    """The largest values of each lane, in decreasing order."""
    largest_KL[:] = _lowest(largest_KL)
    passing = np.empty(LANES, largest_KL.dtype)
    for group in range(len(values_GL)):
        passing[:] = values_GL[group]
        for place in range(min(group + 1, len(largest_KL))):
            best = largest_KL[place]
            for lane in range(LANES):
                above, below = best[lane], passing[lane]
                best[lane] = larger(above, below)
                passing[lane] = smaller(above, below)


@inlined
def _slack(exact: Any, rough: Any, norms: Any) -> Any:
    """How far below the k-th best rough score one can be and still be among the k best of exact ones.

    By Cauchy and Schwarz a product's two roundings change a score by at most |q - q'| |c| + |q'| |c - c'|, and
    float32 sums of Q products by Q + 2 roundings of |q| |c| at most; of two scores either may have moved.
    """
    norm, error = _norm_and_error(exact, rough)
    sums = np.float32(2 * (len(exact) + 2) * EPSILON) * norm * norms[0]
    change = error * norms[0] + (norm + error) * norms[1] + sums
    return np.float32(2.02) * change  # for the roundings of this sum itself


def _integers(scores):
    """The integers that hold scores in their order."""
    raise NotImplementedError("for compiled functions")


@overload(_integers)
def _(scores):
    return (lambda scores: np.int16) if scores.dtype == types.int16 else (lambda scores: np.int32)


def _least(scores, kth, slack):
    """The least rough score of a candidate, as an integer; the least of all where a bound is not a number.

    Rounding does not change the order of numbers, so that a rounded bound holds for rounded scores.
    """
    raise NotImplementedError("for compiled functions")


@overload(_least)
def _(scores, kth, slack):
    lowest, unit = (-(2**15), HALF_DIGIT) if scores.dtype == types.int16 else (-(2**31), 0.0)
    lowest = np.int16(lowest) if scores.dtype == types.int16 else np.int32(lowest)

    def least(scores, kth, slack):
        bound = kth - np.float32(unit) * abs(kth) - slack
        return ordered(as_element(scores, bound)) if abs(bound) < np.inf else lowest

    return least


@inlined
def _choose(ordered_SL: Any, least_L: Any, candidates_SL: Any, scores_SL: Any) -> Any:
    """The sub-keys that reach each lane's bound, and how many rows of them there are.

    A lane with fewer has sub-key -1 after them, with a score below all.
    """
    counts = np.zeros(LANES, np.int64)
    cleared = 0
    for key in range(len(ordered_SL)):
        reaching = lanes_reaching(ordered_SL[key], least_L)
        while reaching != np.uint64(0):
            lane = lowest_bit(reaching)
            reaching &= reaching - np.uint64(1)
            if counts[lane] == cleared:
                candidates_SL[cleared], scores_SL[cleared] = -1, -np.inf
                cleared += 1
            candidates_SL[counts[lane], lane] = key
            counts[lane] += 1
    return cleared


@inlined
def _score(candidates_ML: Any, queries_LPQ: Any, half: int, keys_SQ: Any, scores_SL: Any) -> None:
    """The exact scores of each lane's candidates."""
    for lane in range(len(queries_LPQ)):
        query = queries_LPQ[lane, half]
        for number in range(len(candidates_ML)):
            if candidates_ML[number, lane] < 0:
                break
            key = keys_SQ[candidates_ML[number, lane]]
            score = np.float32(0)
            for d in range(len(query)):
                score += query[d] * key[d]
            scores_SL[number, lane] = score


@inlined
def _clear(scores_KL: Any, numbers_KL: Any) -> None:
    """Nothing found yet; the numbers are valid ones, for scores that are below all."""
    for place in range(len(scores_KL)):
        scores_KL[place], numbers_KL[place] = -np.inf, place


@inlined
def _insert(scores_L: Any, numbers_L: Any, first: int, best_KL: Any, best_numbers_KL: Any) -> None:
    """Put each lane's score, and the number that it stands for, in its place among the best in decreasing order.

    NaN is larger than all: a broken number must not go unseen. The score's own arrays are spent.
    """
    for place in range(first, len(best_KL)):
        best, best_numbers = best_KL[place], best_numbers_KL[place]
        for lane in range(LANES):
            score, above = scores_L[lane], best[lane]
            number, number_above = numbers_L[lane], best_numbers[lane]
            beats = (score > above) | ((score != score) & (above == above))
            best[lane], best_numbers[lane] = (score, number) if beats else (above, number_above)
            scores_L[lane], numbers_L[lane] = (above, number_above) if beats else (score, number)


def _backward(grad: Tensor, ids: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    side, width = keys.shape[2:]
    queries_MQ, keys_NQ = queries.float().reshape(-1, width), keys.float().reshape(-1, width)
    rows_MK = new_tensor((len(queries_MQ), ids.shape[2]), torch.int64)
    grad_MK = new_tensor(rows_MK.shape)
    grad_queries_MQ = new_tensor(queries_MQ.shape)
    in_parallel(
        _to_queries,
        len(ids),
        array(grad.float()),
        array(ids),
        array(keys_NQ),
        side,
        array(rows_MK),
        array(grad_MK),
        array(grad_queries_MQ),
        grain=GRAIN,
    )
    found = segments(rows_MK, len(keys_NQ))
    grad_keys_NQ = table_gradient(keys_NQ, found, array(grad_MK).reshape(-1), array(queries_MQ), False)
    return grad_queries_MQ.view_as(queries).to(queries.dtype), grad_keys_NQ.view_as(keys).to(keys.dtype)


@compiled
def _to_queries(
    start: int,
    stop: int,
    grad_THK: Any,
    ids_THK: Any,
    keys_NQ: Any,
    side: int,
    rows_MK: Any,
    grad_MK: Any,
    grad_queries_MQ: Any,
) -> None:
    """The queries' gradients, and each winner's two sub-keys as rows of all heads' sub-keys, with their gradients."""
    heads, k = grad_THK.shape[1], grad_THK.shape[2]
    for token in range(start, stop):
        for head in range(heads):
            for half in range(2):
                row = (token * heads + head) * 2 + half
                grad_queries_MQ[row] = 0
                for place in range(k):
                    expert = ids_THK[token, head, place]
                    sub_key = expert // side if half == 0 else expert % side
                    key = (head * 2 + half) * side + sub_key
                    rows_MK[row, place], grad_MK[row, place] = key, grad_THK[token, head, place]
                    add_row(grad_queries_MQ[row], grad_THK[token, head, place], keys_NQ, key)


FUNCTIONS = ProductKeyFunctions(_forward, _backward)
