"""Exact product-key retrieval: coarse scores choose candidates, exact ones decide among them.

Coarse scores of four queries at a time come from products of bytes where the processor adds these up
(`byte_scores.py`), and else from float32 products for a block of tokens. Of a few queries they are made by the thread
that asks: what a matrix product and its threads need takes longer. `selection.py` has what follows, for each half, and
the sums of pairs of the two halves' best are ranked the same way.

Legend: `T` tokens, `H` heads, `P` = 2 halves, `Q` width of a half, `S` sub-keys, `K` retrieved, `B` rows of a block,
`M` pairs.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from myriad.kernels.cpu.byte_scores import WIDEST, coarse_scores, multiplies_bytes, packed
from myriad.kernels.cpu.memory import new_tensor
from myriad.kernels.cpu.pairs import best_pairs, partners
from myriad.kernels.cpu.rows import ROWS, add_row, dot_all
from myriad.kernels.cpu.selection import (
    LOWEST,
    SPARE,
    WORD,
    bounds,
    first_candidates,
    groups,
    more_candidates,
    rank,
)
from myriad.kernels.cpu.simd import (
    INFINITY,
    TINY,
    array,
    compiled,
    from_ordered,
    inlined,
    magnitude,
    nearest,
    prefetch_row,
)
from myriad.kernels.cpu.threads import in_parallel
from myriad.kernels.product_key import ProductKeyFunctions

SCORES_PER_BLOCK = 2**22
"""Sub-key scores held at once where they are float32: 16 MB."""
FEW = 32
"""Queries of a head, at most, that one thread scores and chooses for before more has paid off."""
CHUNK = 256
"""Tokens whose queries go over one half's sub-keys before the other's: these stay in the cache."""
COARSE_STEPS = 32_000
"""Of the int16 that float32 scores become, either way of zero."""


def _forward(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    tokens, heads = queries.shape[:2]
    scores_THK, ids_THK = torch.empty(tokens, heads, k), torch.empty(tokens, heads, k, dtype=torch.int64)
    by_bytes = multiplies_bytes() and queries.shape[3] <= WIDEST
    retrieve = _retrieve_few if tokens <= FEW else _retrieve_by_bytes if by_bytes else _retrieve_by_products
    retrieve(queries.detach().float().contiguous(), keys.detach().float(), array(scores_THK), array(ids_THK))
    return scores_THK.to(torch.promote_types(queries.dtype, keys.dtype)), ids_THK


def _retrieve_few(queries_THPQ: Tensor, keys_HPSQ: Tensor, scores_THK: np.ndarray, ids_THK: np.ndarray) -> None:
    choose_for_few(_rows(queries_THPQ), array(keys_HPSQ), scores_THK, ids_THK)


def _retrieve_by_bytes(queries_THPQ: Tensor, keys_HPSQ: Tensor, scores_THK: np.ndarray, ids_THK: np.ndarray) -> None:
    words_HPWFL, measures_HP3 = packed(keys_HPSQ)
    in_parallel(
        _choose_by_bytes,
        len(keys_HPSQ) * _chunks(len(queries_THPQ)),
        _rows(queries_THPQ),
        array(keys_HPSQ),
        words_HPWFL,
        measures_HP3,
        scores_THK,
        ids_THK,
        grain=1,
    )


def _retrieve_by_products(queries_THPQ: Tensor, keys_HPSQ: Tensor, scores_THK: np.ndarray, ids_THK: np.ndarray) -> None:
    tokens, heads = queries_THPQ.shape[:2]
    side = keys_HPSQ.shape[2]
    # Custom ops run under the caller's autocast, which would round the products.
    with torch.autocast("cpu", enabled=False):
        for some, start, stop in _blocks(heads, tokens, side):
            block_HPTQ = queries_THPQ[start:stop, some].permute(1, 2, 0, 3)
            scores_HPTS = new_tensor((*block_HPTQ.shape[:3], side))
            torch.matmul(block_HPTQ, keys_HPSQ[some].transpose(2, 3), out=scores_HPTS)
            in_parallel(
                _choose_by_products,
                len(scores_HPTS) * _chunks(stop - start),
                some.start,
                array(scores_HPTS),
                _rows(queries_THPQ[start:stop]),
                array(keys_HPSQ),
                scores_THK[start:stop],
                ids_THK[start:stop],
                grain=1,
            )


def _rows(tensor: Tensor) -> np.ndarray:
    """Of queries, keys or their gradients, one below the other: a function that need not look for a row in several
    axes makes no views."""
    return array(tensor).reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _chunks(tokens: int) -> int:
    return -(-tokens // CHUNK)


def _blocks(heads: int, tokens: int, side: int) -> Iterator[tuple[slice, int, int]]:
    """Heads, and the first and last token: as many tokens as may be, since each head's sub-keys are read for each of
    its blocks."""
    step = max(1, min(tokens, SCORES_PER_BLOCK // (2 * side)))
    together = max(1, SCORES_PER_BLOCK // (2 * side * step))
    for head in range(0, heads, together):
        for start in range(0, tokens, step):
            yield slice(head, head + together), start, min(start + step, tokens)


class Buffers(NamedTuple):
    """What a thread writes to and reads again, on its way from queries to the best of a chunk of tokens."""

    queries_BQ: Any
    bytes_BQ: Any
    """Queries rounded to int8, a multiple of four wide."""
    starts_B: Any
    coarse_BS: Any
    """int16, whole words of sub-keys."""
    steps_B: Any
    errors_B: Any
    maxima_BG: Any
    bounds_B: Any
    words: Any
    counts_B: Any
    places_BS: Any
    exact_BS: Any
    ranks: Any
    order: Any
    winners_TPK: Any
    """Each half's best scores, best first."""
    sub_keys_TPK: Any
    partners_2K: Any


@compiled
def _buffers(tokens: int, side: int, width: int, k: int) -> Any:
    words, kept = -(-side // WORD), min(k, side)
    partners_2K = partners(k, kept)
    places = max(words * WORD, partners_2K[0].sum()) + 2 * SPARE
    return Buffers(
        np.zeros((ROWS, width), np.float32),
        np.zeros((ROWS, -(-width // 4) * 4), np.int8),
        np.empty(ROWS, np.int32),
        np.full((ROWS, words * WORD), LOWEST, np.int16),
        np.empty(ROWS, np.float32),
        np.zeros(ROWS, np.float32),
        np.empty((ROWS, groups(side, kept)), np.int16),
        np.empty(ROWS, np.int64),
        np.empty(words, np.uint64),
        np.empty(ROWS, np.int64),
        np.empty((ROWS, places), np.int32),
        np.empty((ROWS, places), np.int32),
        np.empty(places, np.int32),
        np.empty(places, np.int32),
        np.empty((tokens, 2, kept + SPARE), np.float32),
        np.empty((tokens, 2, kept + SPARE), np.int32),
        partners_2K,
    )


@compiled
def _choose_by_bytes(
    start: int,
    stop: int,
    queries_MQ: Any,
    keys_HPSQ: Any,
    words_HPWFL: Any,
    measures_HP3: Any,
    scores_THK: Any,
    ids_THK: Any,
) -> None:
    """Chunks of tokens of one head after the other."""
    buffers = _buffers(CHUNK, keys_HPSQ.shape[2], queries_MQ.shape[1], scores_THK.shape[2])
    chunks = -(-len(scores_THK) // CHUNK)
    for unit in range(start, stop):
        _choose_chunk(
            buffers,
            unit // chunks,
            unit % chunks * CHUNK,
            queries_MQ,
            keys_HPSQ,
            words_HPWFL,
            measures_HP3,
            scores_THK,
            ids_THK,
        )


@inlined
def _choose_chunk(
    buffers: Any,
    head: int,
    first: int,
    queries_MQ: Any,
    keys_HPSQ: Any,
    words_HPWFL: Any,
    measures_HP3: Any,
    scores_THK: Any,
    ids_THK: Any,
) -> None:
    tokens, heads, k = scores_THK.shape
    side = keys_HPSQ.shape[2]
    last = min(first + CHUNK, tokens)
    for half in range(2):
        for token in range(first, last, ROWS):
            rows = min(ROWS, last - token)
            for row in range(rows):
                _copy_row(buffers.queries_BQ, row, queries_MQ, ((token + row) * heads + head) * 2 + half)
                prefetch_row(queries_MQ, (min(token + ROWS + row, last - 1) * heads + head) * 2 + half)
            coarse_scores(
                buffers.queries_BQ,
                words_HPWFL[head, half],
                measures_HP3[head, half],
                side,
                buffers.bytes_BQ,
                buffers.starts_B,
                buffers.coarse_BS,
                buffers.steps_B,
                buffers.errors_B,
            )
            _choose(buffers, rows, min(k, side), keys_HPSQ[head, half], token - first, half)
    for token in range(first, last):
        _pair(buffers, token - first, side, scores_THK[token, head], ids_THK[token, head])


@compiled
def _choose_by_products(
    start: int,
    stop: int,
    first_head: int,
    scores_HPTS: Any,
    queries_MQ: Any,
    keys_HPSQ: Any,
    scores_THK: Any,
    ids_THK: Any,
) -> None:
    """Chunks of a block's tokens of one head after the other."""
    buffers = _buffers(CHUNK, keys_HPSQ.shape[2], queries_MQ.shape[1], scores_THK.shape[2])
    chunks = -(-len(scores_THK) // CHUNK)
    for unit in range(start, stop):
        first = unit % chunks * CHUNK
        span = (first, min(first + CHUNK, len(scores_THK)), first_head + unit // chunks)
        _choose_scored(buffers, span, scores_HPTS[unit // chunks], queries_MQ, keys_HPSQ, scores_THK, ids_THK)


@compiled
def choose_for_few(queries_MQ: Any, keys_HPSQ: Any, scores_THK: Any, ids_THK: Any) -> None:
    """All heads, one after the other."""
    tokens, heads, k = scores_THK.shape
    side, width = keys_HPSQ.shape[2:]
    buffers = _buffers(tokens, side, width, k)
    queries_TQ = np.empty((tokens, width), np.float32)
    scores_PTS = np.empty((2, tokens, side), np.float32)
    for head in range(heads):
        for half in range(2):
            for token in range(tokens):
                _copy_row(queries_TQ, token, queries_MQ, (token * heads + head) * 2 + half)
            dot_all(queries_TQ, keys_HPSQ[head, half], scores_PTS[half])
        _choose_scored(buffers, (0, tokens, head), scores_PTS, queries_MQ, keys_HPSQ, scores_THK, ids_THK)


@inlined
def _choose_scored(
    buffers: Any, span: Any, scores_PTS: Any, queries_MQ: Any, keys_HPSQ: Any, scores_THK: Any, ids_THK: Any
) -> None:
    """For tokens of a head whose float32 scores are known; `span` is the first, the last and the head."""
    first, last, head = span
    heads, side, k = len(keys_HPSQ), keys_HPSQ.shape[2], scores_THK.shape[2]
    for half in range(2):
        for token in range(first, last, ROWS):
            rows = min(ROWS, last - token)
            for row in range(rows):
                _copy_row(buffers.queries_BQ, row, queries_MQ, ((token + row) * heads + head) * 2 + half)
                buffers.steps_B[row] = _coarsen(scores_PTS[half, token + row], buffers.coarse_BS[row])
            _choose(buffers, rows, min(k, side), keys_HPSQ[head, half], token - first, half)
    for token in range(first, last):
        _pair(buffers, token - first, side, scores_THK[token, head], ids_THK[token, head])


@inlined
def _copy_row(target: Any, row: int, source: Any, other: int) -> None:
    for d in range(target.shape[1]):
        target[row, d] = source[other, d]


@inlined
def _coarsen(scores_S: Any, coarse_S: Any) -> Any:
    """Round a row of scores to int16; how many of their steps go to a unit: NaN if a score is not finite.

    They are off by less than a step, as far as a float32 score can be said to be exact.
    """
    largest = np.int32(0)
    for key in range(len(scores_S)):
        largest = max(largest, magnitude(scores_S[key]))
    if largest >= INFINITY:
        return np.float32(np.nan)
    bound = from_ordered(largest)
    steps = np.float32(COARSE_STEPS) / bound if bound > TINY else np.float32(0)
    for key in range(len(scores_S)):
        coarse_S[key] = nearest(scores_S[key] * steps)
    return steps


@inlined
def _choose(buffers: Any, rows: int, kept: int, keys_SQ: Any, place: int, half: int) -> None:
    """From rows of coarse scores to the best of the half."""
    bounds(buffers.coarse_BS, rows, kept, buffers.maxima_BG, buffers.bounds_B)
    for row in range(rows):
        is_bounded = abs(buffers.errors_B[row] * buffers.steps_B[row]) < np.inf
        buffers.counts_B[row] = first_candidates(
            buffers.coarse_BS[row],
            buffers.bounds_B[row],
            is_bounded,
            buffers.queries_BQ[row],
            keys_SQ,
            buffers.words,
            (buffers.places_BS[row], buffers.exact_BS[row]),
        )
    for row in range(rows):
        buffers.counts_B[row] = more_candidates(
            buffers.coarse_BS[row],
            buffers.bounds_B[row],
            buffers.steps_B[row],
            buffers.errors_B[row],
            buffers.queries_BQ[row],
            keys_SQ,
            buffers.words,
            (buffers.places_BS[row], buffers.exact_BS[row]),
            buffers.counts_B[row],
        )
    for row in range(rows):
        rank(buffers.exact_BS[row], buffers.counts_B[row], buffers.ranks, buffers.order)
        for best in range(kept):
            chosen = buffers.order[best]
            buffers.winners_TPK[place + row, half, best] = from_ordered(buffers.exact_BS[row, chosen])
            buffers.sub_keys_TPK[place + row, half, best] = buffers.places_BS[row, chosen]


@inlined
def _pair(buffers: Any, place: int, side: int, scores_K: Any, ids_K: Any) -> None:
    best_pairs(
        buffers.winners_TPK[place],
        buffers.sub_keys_TPK[place],
        buffers.partners_2K,
        side,
        (buffers.exact_BS[0], buffers.places_BS[0], buffers.places_BS[1], buffers.ranks, buffers.order),
        scores_K,
        ids_K,
    )


def _backward(grad: Tensor, ids: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    heads, _, side, width = keys.shape
    pieces = -(-torch.get_num_threads() // (2 * heads))
    grad_queries_THPQ = new_tensor(queries.shape)
    grads_keys_CHPSQ = new_tensor((pieces, heads, 2, side, width))
    in_parallel(
        _look_back,
        pieces * heads * 2,
        side,
        array(grad.float()),
        array(ids),
        _rows(queries.float()),
        _rows(keys.float()),
        _rows(grad_queries_THPQ),
        _rows(grads_keys_CHPSQ),
        grain=1,
    )
    grad_keys_HPSQ = grads_keys_CHPSQ[0] if pieces == 1 else grads_keys_CHPSQ.sum(0)
    return grad_queries_THPQ.to(queries.dtype), grad_keys_HPSQ.to(keys.dtype)


@compiled
def _look_back(
    start: int,
    stop: int,
    side: int,
    grad_THK: Any,
    ids_THK: Any,
    queries_MQ: Any,
    keys_MQ: Any,
    grad_queries_MQ: Any,
    grads_keys_MQ: Any,
) -> None:
    """One half of one head for a piece of the tokens: its sub-keys and their gradients stay in the cache.

    Each piece has gradients of the sub-keys of its own, which are added up in order.
    """
    tokens, heads, k = ids_THK.shape
    pieces = len(grads_keys_MQ) // len(keys_MQ)
    for unit in range(start, stop):
        piece, head, half = unit // (2 * heads), unit // 2 % heads, unit % 2
        first = (head * 2 + half) * side
        mine = piece * len(keys_MQ) + first
        grads_keys_MQ[mine : mine + side] = 0
        for token in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
            query = (token * heads + head) * 2 + half
            grad_queries_MQ[query : query + 1] = 0
            for place in range(k):
                expert, grad = ids_THK[token, head, place], grad_THK[token, head, place]
                sub_key = expert // side if half == 0 else expert % side
                add_row(grad_queries_MQ, query, grad, keys_MQ, first + sub_key)
                add_row(grads_keys_MQ, mine + sub_key, grad, queries_MQ, query)


FUNCTIONS = ProductKeyFunctions(_forward, _backward)
