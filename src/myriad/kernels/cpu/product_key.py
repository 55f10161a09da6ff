"""Exact product-key retrieval: cheap scores choose candidates, exact ones choose among them.

For a block of tokens the scores of all sub-keys come from one matrix product, in bfloat16 where that is fast. They
are compared 64 at a time: the k-th largest of the maxima of groups of sub-keys is a threshold that at least k scores
reach. Every score that could belong to the k best in exact arithmetic, by a bound on the rounding of that token's
products, becomes a candidate and is scored again in float32; how many others are larger is its rank. Where a bound
is not a number, all are candidates.

Legend: `T` tokens, `H` heads, `P` = 2 halves, `Q` width of a half, `S` sub-keys, `K` retrieved, `G` groups of sub-keys,
`M` pairs.
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
from myriad.kernels.cpu.rows import GRAIN, add_row, dot
from myriad.kernels.cpu.simd import (
    WORD,
    above,
    array,
    as_element,
    as_ordered,
    bit_count,
    compiled,
    from_ordered,
    inlined,
    keep_larger,
    lowest_bit,
    ordered,
    reaching,
    wide,
)
from myriad.kernels.cpu.threads import in_parallel
from myriad.kernels.hardware import multiplies_bfloat16_fast
from myriad.kernels.product_key import ProductKeyFunctions, candidate_pairs

SCORES_PER_BLOCK = 2**22
"""Sub-key scores held at once: 8 MB in bfloat16, which a block's selection finds in the cache."""
FEW = 32
"""Queries of a head, at most, that one thread scores and chooses for before a matrix product has paid off."""
GROUPS_PER_WINNER = 4
"""Groups of sub-keys for each one retrieved: more give a closer threshold, fewer less to compare."""
HALF_DIGIT = 2.0**-8
"""The largest relative error of a number rounded to bfloat16."""
EPSILON = 2.0**-24
"""The same for float32."""


def _forward(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (_forward_few if len(queries) <= FEW else _forward_many)(queries, keys, k)


def _forward_few(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All in one call and on one thread: what a matrix product and its threads need takes longer."""
    tokens, heads = queries.shape[:2]
    scores_THK, ids_THK = torch.empty(tokens, heads, k), torch.empty(tokens, heads, k, dtype=torch.int64)
    pairs_2M = _pairs(k, keys.shape[2])
    _retrieve_few(array(queries.float()), array(keys.float()), pairs_2M, array(scores_THK), array(ids_THK))
    return scores_THK.to(torch.promote_types(queries.dtype, keys.dtype)), ids_THK


def _forward_many(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    tokens, heads = queries.shape[:2]
    side = keys.shape[2]
    scores_HTK = torch.empty(heads, tokens, k)
    ids_HTK = torch.empty(heads, tokens, k, dtype=torch.int64)
    queries_HTPQ = queries.detach().float().transpose(0, 1).contiguous()
    keys_HPSQ = keys.detach().float().contiguous()
    screens = multiplies_bfloat16_fast("cpu")
    rough_queries = queries_HTPQ.bfloat16() if screens else queries_HTPQ
    rough_keys = keys_HPSQ.bfloat16() if screens else keys_HPSQ
    pairs_2M = _pairs(k, side)
    norms_HP2 = _norms(array(keys_HPSQ), array(rough_keys)) if screens else np.zeros((heads, 2, 2), np.float32)
    # Custom ops run under the caller's autocast, which would round the float32 products.
    with torch.autocast("cpu", enabled=False):
        for some, start, stop in _blocks(heads, tokens, side):
            block = rough_queries[some, start:stop].transpose(1, 2)
            rough_HPTS = new_tensor((len(block), 2, stop - start, side), rough_keys.dtype)
            torch.matmul(block, rough_keys[some].transpose(2, 3), out=rough_HPTS)
            in_parallel(
                _retrieve,
                len(block) * (stop - start),
                start,
                array(rough_HPTS),
                array(rough_queries[some]),
                array(queries_HTPQ[some]),
                array(keys_HPSQ[some]),
                norms_HP2[some],
                pairs_2M,
                array(scores_HTK[some]),
                array(ids_HTK[some]),
                grain=GRAIN,
            )
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    return scores_HTK.transpose(0, 1).to(dtype).contiguous(), ids_HTK.transpose(0, 1).contiguous()


def _blocks(heads: int, tokens: int, side: int) -> Iterator[tuple[slice, int, int]]:
    """Heads, and the first and last token: as many tokens as may be, since each head's sub-keys are read for each of
    its blocks."""
    step = max(1, min(tokens, SCORES_PER_BLOCK // (2 * side)))
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
                found = _norm_and_error(exact_HPSQ, rough_HPSQ, (head, half, key))
                for place in range(2):
                    if not found[place] <= largest[head, half, place]:  # NaN too
                        largest[head, half, place] = found[place]
    return largest


@inlined
def _norm_and_error(exact: Any, rough: Any, row: Any) -> Any:
    i, j, k = row
    norm = error = np.float32(0)
    for d in range(exact.shape[3]):
        change = exact[i, j, k, d] - wide(rough[i, j, k, d])
        norm += exact[i, j, k, d] * exact[i, j, k, d]
        error += change * change
    return np.sqrt(norm), np.sqrt(error)


@compiled
def _retrieve(
    start: int,
    stop: int,
    offset: int,
    rough_HPTS: Any,
    rough_queries_HTPQ: Any,
    queries_HTPQ: Any,
    keys_HPSQ: Any,
    norms_HP2: Any,
    pairs_2M: Any,
    scores_HTK: Any,
    ids_HTK: Any,
) -> None:
    """Tokens of one head after the other, of a block that begins at token `offset`."""
    tokens, side, k = rough_HPTS.shape[2], rough_HPTS.shape[3], scores_HTK.shape[2]
    kept, number = min(k, side), pairs_2M.shape[1]
    words = -(-side // WORD)
    ordered_S = np.empty(words * WORD, _integers(rough_HPTS))
    ordered_S[:] = _lowest(ordered_S)
    maxima_G = np.empty(min(words, -(-GROUPS_PER_WINNER * kept // WORD)) * WORD, ordered_S.dtype)
    candidates_S = np.empty(words * WORD, np.int32)
    exact_S = np.empty(words * WORD, np.int32)
    winners_PK = np.empty((2, kept), np.float32)
    sub_keys_PK = np.empty((2, kept), np.int32)
    sums_M = np.empty(-(-number // WORD) * WORD, np.int32)
    for unit in range(start, stop):
        head, row = unit // tokens, unit % tokens
        token = offset + row
        for half in range(2):
            _order(rough_HPTS[head], (half, row), ordered_S, maxima_G)
            slack = _slack(queries_HTPQ, rough_queries_HTPQ, (head, token, half), norms_HP2)
            least = _least(rough_HPTS, from_ordered(_largest(maxima_G, kept)), slack)
            count = _choose(ordered_S, side, least, candidates_S)
            for place in range(count):
                key = candidates_S[place]
                score = np.float32(0)
                for d in range(queries_HTPQ.shape[3]):
                    score += queries_HTPQ[head, token, half, d] * keys_HPSQ[head, half, key, d]
                exact_S[place] = ordered(score)
            _sort(exact_S, candidates_S, count, winners_PK[half], sub_keys_PK[half])
        _pair(winners_PK, sub_keys_PK, pairs_2M, sums_M, side, scores_HTK[head, token], ids_HTK[head, token])


@compiled
def _retrieve_few(queries_THPQ: Any, keys_HPSQ: Any, pairs_2M: Any, scores_THK: Any, ids_THK: Any) -> None:
    """The same in float32 alone: scores that are exact are candidates without a bound's slack."""
    tokens, heads, _, width = queries_THPQ.shape
    side, k = keys_HPSQ.shape[2], scores_THK.shape[2]
    kept = min(k, side)
    words = -(-side // WORD)
    queries_TQ = np.empty((tokens, width), np.float32)
    scores_PTS = np.empty((2, tokens, side), np.float32)
    ordered_S = np.empty(words * WORD, np.int32)
    ordered_S[:] = _lowest(ordered_S)
    maxima_G = np.empty(min(words, -(-GROUPS_PER_WINNER * kept // WORD)) * WORD, np.int32)
    candidates_S = np.empty(words * WORD, np.int32)
    exact_S = np.empty(words * WORD, np.int32)
    winners_PK = np.empty((2, kept), np.float32)
    sub_keys_PK = np.empty((2, kept), np.int32)
    sums_M = np.empty(-(-pairs_2M.shape[1] // WORD) * WORD, np.int32)
    for head in range(heads):
        for half in range(2):
            queries_TQ[:] = queries_THPQ[:, head, half]
            _score(queries_TQ, keys_HPSQ[head, half], scores_PTS[half])
        for token in range(tokens):
            for half in range(2):
                _order(scores_PTS, (half, token), ordered_S, maxima_G)
                count = _choose(ordered_S, side, _largest(maxima_G, kept), candidates_S)
                for place in range(count):
                    exact_S[place] = ordered_S[candidates_S[place]]
                _sort(exact_S, candidates_S, count, winners_PK[half], sub_keys_PK[half])
            _pair(winners_PK, sub_keys_PK, pairs_2M, sums_M, side, scores_THK[token, head], ids_THK[token, head])


@inlined
def _score(queries_TQ: Any, keys_SQ: Any, scores_TS: Any) -> None:
    """Each query's scores with each sub-key, four by two at a time: a number read takes part in several products."""
    tokens, side = scores_TS.shape
    for key in range(0, side - 1, 2):
        for first in range(0, tokens - 3, 4):
            a = b = c = d = e = f = g = h = np.float32(0)
            for q in range(queries_TQ.shape[1]):
                a += queries_TQ[first, q] * keys_SQ[key, q]
                b += queries_TQ[first + 1, q] * keys_SQ[key, q]
                c += queries_TQ[first + 2, q] * keys_SQ[key, q]
                d += queries_TQ[first + 3, q] * keys_SQ[key, q]
                e += queries_TQ[first, q] * keys_SQ[key + 1, q]
                f += queries_TQ[first + 1, q] * keys_SQ[key + 1, q]
                g += queries_TQ[first + 2, q] * keys_SQ[key + 1, q]
                h += queries_TQ[first + 3, q] * keys_SQ[key + 1, q]
            scores_TS[first, key], scores_TS[first, key + 1] = a, e
            scores_TS[first + 1, key], scores_TS[first + 1, key + 1] = b, f
            scores_TS[first + 2, key], scores_TS[first + 2, key + 1] = c, g
            scores_TS[first + 3, key], scores_TS[first + 3, key + 1] = d, h
        for token in range(tokens - tokens % 4, tokens):
            scores_TS[token, key] = dot(queries_TQ, token, keys_SQ, key)
            scores_TS[token, key + 1] = dot(queries_TQ, token, keys_SQ, key + 1)
    if side % 2:
        for token in range(tokens):
            scores_TS[token, side - 1] = dot(queries_TQ, token, keys_SQ, side - 1)


@inlined
def _sort(exact_S: Any, candidates_S: Any, count: int, winners_K: Any, sub_keys_K: Any) -> None:
    """The best of a half's candidates, best first."""
    _pad(exact_S, count)
    for place in range(count):
        rank = _rank(exact_S, count, place)
        if rank < len(winners_K):
            winners_K[rank] = from_ordered(exact_S[place])
            sub_keys_K[rank] = candidates_S[place]


@inlined
def _pair(winners_PK: Any, sub_keys_PK: Any, pairs_2M: Any, sums_M: Any, side: int, scores_K: Any, ids_K: Any) -> None:
    """The best sums of a score of each half, best first, and their experts."""
    number = pairs_2M.shape[1]
    for pair in range(number):
        sums_M[pair] = ordered(winners_PK[0, pairs_2M[0, pair]] + winners_PK[1, pairs_2M[1, pair]])
    _pad(sums_M, number)
    for pair in range(number):
        rank = _rank(sums_M, number, pair)
        if rank < len(scores_K):
            scores_K[rank] = from_ordered(sums_M[pair])
            sub_key = np.int64(sub_keys_PK[0, pairs_2M[0, pair]])
            ids_K[rank] = sub_key * side + sub_keys_PK[1, pairs_2M[1, pair]]


@inlined
def _lowest(numbers: Any) -> Any:
    """The lowest integer that an array can hold: below all scores."""
    return -(1 << (8 * numbers.itemsize - 1))


@inlined
def _order(scores: Any, row: Any, ordered_S: Any, maxima_G: Any) -> None:
    """Scores as integers of the same order, and the largest of each group of sub-keys."""
    half, token = row
    for key in range(scores.shape[2]):
        ordered_S[key] = ordered(scores[half, token, key])
    maxima_G[:] = ordered_S[: len(maxima_G)]
    for first in range(len(maxima_G), len(ordered_S), WORD):
        keep_larger(maxima_G, first % len(maxima_G), ordered_S, first)


@inlined
def _largest(numbers_G: Any, k: int) -> Any:
    """The k-th largest of so many words of integers, bit by bit."""
    found = np.int64(_lowest(numbers_G))
    for bit in range(8 * numbers_G.itemsize - 1, -1, -1):
        higher, count = found + (1 << bit), 0
        for first in range(0, len(numbers_G), WORD):
            count += bit_count(reaching(numbers_G, first, higher))
        found = higher if count >= k else found
    return as_ordered(numbers_G, found)


@inlined
def _slack(exact: Any, rough: Any, row: Any, norms: Any) -> Any:
    """How far below the k-th best rough score one can be and still be among the k best of exact ones.

    By Cauchy and Schwarz a product's two roundings change a score by at most |q - q'| |c| + |q'| |c - c'|, and
    float32 sums of Q products by Q + 2 roundings of |q| |c| at most; of two scores either may have moved.
    """
    norm, error = _norm_and_error(exact, rough, row)
    head, half = row[0], row[2]
    longest, moved = norms[head, half, 0], norms[head, half, 1]
    sums = np.float32(2 * (exact.shape[3] + 2) * EPSILON) * norm * longest
    change = error * longest + (norm + error) * moved + sums
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
def _choose(ordered_S: Any, side: int, least: int, candidates_S: Any) -> Any:
    """The sub-keys that reach the bound, and how many they are."""
    count = 0
    for first in range(0, len(ordered_S), WORD):
        bits = reaching(ordered_S, first, least)
        while bits != np.uint64(0):
            candidates_S[count] = first + lowest_bit(bits)
            count += candidates_S[count] < side  # the last word may reach beyond
            bits &= bits - np.uint64(1)
    return count


@inlined
def _pad(numbers: Any, count: int) -> None:
    """Fill the last word with what ranks last."""
    for place in range(count, -(-count // WORD) * WORD):
        numbers[place] = _lowest(numbers)


@inlined
def _rank(numbers: Any, count: int, place: int) -> Any:
    """How many of so many integers are larger than the one at a place, or as large and before it."""
    rank = 0
    for first in range(0, count, WORD):
        larger = above(numbers, first, numbers[place])
        as_large = reaching(numbers, first, numbers[place]) & ~larger
        if first <= place < first + WORD:
            as_large &= (np.uint64(1) << np.uint64(place - first)) - np.uint64(1)
        rank += bit_count(larger) + (bit_count(as_large) if first <= place else 0)
    return rank


def _backward(grad: Tensor, ids: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    heads, _, side, width = keys.shape
    pieces = -(-torch.get_num_threads() // (2 * heads))
    grad_queries_THPQ = new_tensor(queries.shape)
    grads_keys_CHPSQ = new_tensor((pieces, heads, 2, side, width))
    in_parallel(
        _look_back,
        pieces * heads * 2,
        array(grad.float()),
        array(ids),
        array(queries.float()),
        array(keys.float()),
        array(grad_queries_THPQ),
        array(grads_keys_CHPSQ),
        grain=1,
    )
    grad_keys_HPSQ = grads_keys_CHPSQ[0] if pieces == 1 else grads_keys_CHPSQ.sum(0)
    return grad_queries_THPQ.to(queries.dtype), grad_keys_HPSQ.to(keys.dtype)


@compiled
def _look_back(
    start: int,
    stop: int,
    grad_THK: Any,
    ids_THK: Any,
    queries_THPQ: Any,
    keys_HPSQ: Any,
    grad_queries_THPQ: Any,
    grads_keys_CHPSQ: Any,
) -> None:
    """One half of one head for a piece of the tokens: its sub-keys and their gradients stay in the cache.

    Each piece has gradients of the sub-keys of its own, which are added up in order.
    """
    pieces, heads, _, side, _ = grads_keys_CHPSQ.shape
    tokens, k = len(ids_THK), ids_THK.shape[2]
    for unit in range(start, stop):
        piece, head, half = unit // (2 * heads), unit // 2 % heads, unit % 2
        keys_SQ, grad_keys_SQ = keys_HPSQ[head, half], grads_keys_CHPSQ[piece, head, half]
        grad_keys_SQ[:] = 0
        for token in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
            queries_PQ, grad_query_Q = queries_THPQ[token, head], grad_queries_THPQ[token, head, half]
            grad_query_Q[:] = 0
            for place in range(k):
                expert, grad = ids_THK[token, head, place], grad_THK[token, head, place]
                sub_key = expert // side if half == 0 else expert % side
                add_row(grad_query_Q, grad, keys_SQ, sub_key)
                add_row(grad_keys_SQ[sub_key], grad, queries_PQ, half)


FUNCTIONS = ProductKeyFunctions(_forward, _backward)
