"""`product_key` in Triton: scores of blocks of tokens by tensor cores, then the top k of each row of them.

Scores are float32. Where queries are, tl.dot in "tf32x3" splits each factor in two, which leaves errors of float32's
own size; queries in bfloat16 are multiplied as they are, with keys that lose no more digits than the queries have lost.

A row's top k are found in two steps: its columns are cut into groups of neighbours, of which the k with the largest
maxima hold all winners; then the winners are taken among these groups' columns. Each step takes maxima one by one,
which is exact whatever the numbers; as a maximum costs the row's length, k above `MOST_WINNERS` and more than
`MOST_SUB_KEYS` sub-keys go to the reference. Few threads share a row: maxima that many find together cost several times
as much.

The gradient of the sub-keys takes one of two ways: a product of (sub-keys x tokens) gradients, which are put in their
places on the way, and queries, which costs sub-keys x tokens; or sorted entries, as for a table, which does not.

Floats are compared as integers of the same order: NaN ranks above infinity, as in `torch.topk`, and a number is
told from its equals by its place. Scores of bfloat16 queries are ranked by all of their digits but the last few, where
the place stands instead.

Legend: `T` tokens, `H` heads, `P` = 2 halves, `K` retrieved, `L` of each half, `S` = side, `Q` width of a half, `C`
candidates, `G` groups of `W` columns.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from myriad.kernels.product_key import (
    ProductKeyFunctions,
    candidate_pairs,
    reference_backward,
    reference_forward,
)
from myriad.kernels.triton.launch import PROGRAMS, SUM_COLUMNS, SUM_ENTRIES, TILE, launch
from myriad.kernels.triton.products import add_weighted, product_dtype
from myriad.kernels.triton.segments import Terms, narrowest, segment_sums, segments

MOST_WINNERS = 64
MOST_SUB_KEYS = 4096
SCORES_PER_BLOCK = 2**26
"""Sub-key scores held at once: 256 MB, so that a layer's step takes few launches."""
NUMBERS_PER_WARP = 1024
"""Scores that one warp ranks at a time: 32 a thread, of several rows."""
MOST_PLACED = 512
"""Sub-keys of a half up to which a product is the faster gradient, where it multiplies bfloat16."""
TOKENS_AT_ONCE = 64
"""In such a product."""
LOWEST = tl.constexpr(-(2**31))
"""Below every number's rank."""


def forward(queries_THPQ: Tensor, keys_HPSQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores, in the promoted dtype, and their experts, int64: both of shape (T, H, K)."""
    tokens, heads = queries_THPQ.shape[:2]
    side = keys_HPSQ.shape[2]
    if k > MOST_WINNERS or side > MOST_SUB_KEYS:
        return reference_forward(queries_THPQ, keys_HPSQ, k)
    queries, keys = queries_THPQ.contiguous(), _multiplied_with(queries_THPQ, keys_HPSQ)
    scores_THK = torch.empty(tokens, heads, k, dtype=torch.float32, device=queries.device)
    ids_THK = torch.empty(tokens, heads, k, dtype=torch.int64, device=queries.device)
    step = max(1, SCORES_PER_BLOCK // (heads * 2 * side))
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        halves = _best_sub_keys(queries[block], keys, min(k, side))
        _best_sums(*halves, side, queries.dtype, scores_THK[block], ids_THK[block])
    return scores_THK.to(torch.promote_types(queries_THPQ.dtype, keys_HPSQ.dtype)), ids_THK


def backward(grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys, each in its own dtype: only winners have one, so no score is computed again."""
    if grad_THK.shape[-1] > MOST_WINNERS:
        return reference_backward(grad_THK, ids_THK, queries_THPQ, keys_HPSQ)
    grad_THK, ids_THK = grad_THK.contiguous(), ids_THK.contiguous()
    queries, keys = queries_THPQ.contiguous(), _multiplied_with(queries_THPQ, keys_HPSQ)
    grad_keys = _key_gradients(grad_THK, ids_THK, queries, keys)
    return _query_gradients(grad_THK, ids_THK, queries, keys), grad_keys.to(keys_HPSQ.dtype)


FUNCTIONS = ProductKeyFunctions(forward, backward)


def _multiplied_with(queries_THPQ: Tensor, keys_HPSQ: Tensor) -> Tensor:
    """The keys as queries are multiplied with them."""
    return (keys_HPSQ.bfloat16() if queries_THPQ.dtype == torch.bfloat16 else keys_HPSQ).contiguous()


@cache
def _pairs(k: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks of the candidate pairs, int32; kept, since to list them on the device is to wait for it."""
    first, second = candidate_pairs(k, side, torch.device("cpu"))
    return first.to(device, torch.int32), second.to(device, torch.int32)


def _best_sub_keys(queries_THPQ: Tensor, keys_HPSQ: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best scores of each half, float32, and their sub-keys, int32: both of shape (H, 2, L, T)."""
    scores_HPTS, maxima_HPGT = _sub_key_scores(queries_THPQ, keys_HPSQ, count)
    return _top(scores_HPTS, maxima_HPGT, count, queries_THPQ.dtype)


def _grouping(side: int, count: int) -> tuple[int, int]:
    """Groups of a row, and columns of a group, of which 1 is none."""
    width, winners = triton.next_power_of_2(side), triton.next_power_of_2(count)
    # As many groups as columns of the groups that are left: the two steps are equally long.
    groups = min(width, triton.next_power_of_2(math.isqrt(width * winners)))
    return groups, width // groups


def _sub_key_scores(queries_THPQ: Tensor, keys_HPSQ: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Every sub-key's score, float32 of shape (H, 2, T, S), and the largest of each group, of shape (H, 2, G, T), empty
    without groups."""
    tokens, heads, _, width = queries_THPQ.shape
    side = keys_HPSQ.shape[2]
    groups, size = _grouping(side, count)
    scores = torch.empty(heads, 2, tokens, side, dtype=torch.float32, device=queries_THPQ.device)
    maxima = scores.new_empty(heads, 2, groups if size > 1 else 0, tokens)
    rows = 64 if tokens > 32 else 16
    columns = min(128, max(16, triton.next_power_of_2(side)))
    narrow = queries_THPQ.dtype == torch.bfloat16
    launch(
        _scores,
        (triton.cdiv(tokens, rows), triton.cdiv(side, columns), heads * 2),
        queries_THPQ,
        keys_HPSQ,
        scores,
        maxima,
        tokens,
        HALVES=heads * 2,
        S=side,
        Q=width,
        G=groups,
        W=size,
        NEAR=min(8, columns // size),
        BLOCK_T=rows,
        BLOCK_S=columns,
        BLOCK_Q=min(128 if narrow else 32, max(16, triton.next_power_of_2(width))),
        PRODUCT=product_dtype(queries_THPQ.dtype),
        num_warps=4,
        num_stages=1 if narrow else 2,
    )
    return scores, maxima


def _top(scores_HPTS: Tensor, maxima_HPGT: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest numbers of every row and their columns, in the shape of `_best_sub_keys`."""
    heads, _, tokens, side = scores_HPTS.shape
    groups, size = _grouping(side, count)
    best = torch.empty(heads, 2, count, tokens, dtype=torch.float32, device=scores_HPTS.device)
    columns = torch.empty(heads, 2, count, tokens, dtype=torch.int32, device=scores_HPTS.device)
    candidates = triton.next_power_of_2(count * size) if size > 1 else groups
    rows = _rows_of(tokens, heads * 2, max(groups, candidates))
    launch(
        _top_columns,
        (triton.cdiv(tokens, rows), heads * 2),
        scores_HPTS,
        maxima_HPGT,
        best,
        columns,
        tokens,
        S=side,
        L=count,
        G=groups,
        W=size,
        EXACT=dtype != torch.bfloat16,
        BLOCK_C=candidates,
        BLOCK_L=triton.next_power_of_2(count),
        BLOCK_T=rows,
        num_warps=1,
    )
    return best, columns


def _best_sums(
    best_HPLT: Tensor, columns_HPLT: Tensor, side: int, dtype: torch.dtype, scores_THK: Tensor, ids_THK: Tensor
) -> None:
    """Write the best sums of one score of each half, and the experts."""
    tokens, heads, k = scores_THK.shape
    firsts, seconds = _pairs(k, side, scores_THK.device)
    candidates = triton.next_power_of_2(len(firsts))
    rows = _rows_of(tokens, heads, candidates)
    launch(
        _top_sums,
        (triton.cdiv(tokens, rows), heads),
        best_HPLT,
        columns_HPLT,
        firsts,
        seconds,
        scores_THK,
        ids_THK,
        tokens,
        H=heads,
        S=side,
        L=best_HPLT.shape[2],
        C=len(firsts),
        K=k,
        EXACT=dtype != torch.bfloat16,
        BLOCK_C=candidates,
        BLOCK_K=triton.next_power_of_2(k),
        BLOCK_T=rows,
        num_warps=1,
    )


def _rows_of(tokens: int, halves: int, candidates: int) -> int:
    """Rows of so many candidates that a warp ranks: fewer where few warps would leave the GPU idle."""
    rows = max(1, NUMBERS_PER_WARP // candidates)
    while rows > 4 and triton.cdiv(tokens, rows) * halves < PROGRAMS:
        rows //= 2
    return rows


def _query_gradients(grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor) -> Tensor:
    """For each half of a query the sum over its winners of grad * sub-key."""
    heads, _, side, width = keys_HPSQ.shape
    winners = ids_THK.shape[-1]
    out_THPQ = torch.empty_like(queries_THPQ)
    columns = max(16, triton.next_power_of_2(width))
    block = min(triton.next_power_of_2(winners), max(1, SUM_ENTRIES * SUM_COLUMNS // columns))
    launch(
        _winners_sub_keys,
        (ids_THK.shape[0] * heads, 2),
        grad_THK,
        ids_THK,
        keys_HPSQ,
        out_THPQ,
        H=heads,
        K=winners,
        S=side,
        Q=width,
        BLOCK_K=block,
        BLOCK_Q=columns,
        num_warps=1,
    )
    return out_THPQ


def _key_gradients(grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor) -> Tensor:
    """For each sub-key the sum over its winners of grad * half of a query."""
    narrow = queries_THPQ.dtype == torch.bfloat16
    way = _placed_gradients if narrow and keys_HPSQ.shape[2] <= MOST_PLACED else _sorted_gradients
    return way(grad_THK, ids_THK, queries_THPQ, keys_HPSQ)


def _sorted_gradients(grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor) -> Tensor:
    heads, _, side, width = keys_HPSQ.shape
    tokens, _, winners = ids_THK.shape
    rows = heads * 2 * side
    rows_MK = torch.empty(tokens * heads * 2, winners, dtype=narrowest(rows), device=ids_THK.device)
    grad_MK = grad_THK.new_empty(rows_MK.shape)
    grid = (triton.cdiv(grad_THK.numel(), TILE // 4),)
    sizes = {"H": heads, "K": winners, "S": side, "BLOCK": TILE // 4}
    launch(_half_entries, grid, grad_THK, ids_THK, grad_MK, rows_MK, grad_THK.numel(), **sizes, num_warps=4)
    found = segments(rows_MK, rows, sparse=False)
    (sums,) = segment_sums(found, Terms(grad_MK, queries_THPQ.reshape(-1, width), torch.float32))
    return sums.view_as(keys_HPSQ)


def _placed_gradients(grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor) -> Tensor:
    """Tokens are split among programs, whose sums are added up in order."""
    heads, _, side, width = keys_HPSQ.shape
    tokens, _, winners = ids_THK.shape
    rows = min(128, max(16, triton.next_power_of_2(side)))
    columns = min(128, max(16, triton.next_power_of_2(width)))
    tiles = triton.cdiv(width, columns)
    splits = max(1, min(triton.cdiv(tokens, 256), PROGRAMS // (heads * 2 * triton.cdiv(side, rows) * tiles)))
    sums = torch.empty(splits, *keys_HPSQ.shape, dtype=torch.float32, device=keys_HPSQ.device)
    launch(
        _sub_key_sums,
        (heads * 2 * tiles, triton.cdiv(side, rows), splits),
        grad_THK,
        ids_THK,
        queries_THPQ,
        sums,
        tokens,
        triton.cdiv(triton.cdiv(tokens, splits), TOKENS_AT_ONCE) * TOKENS_AT_ONCE,
        H=heads,
        K=winners,
        S=side,
        Q=width,
        BLOCK_S=rows,
        BLOCK_T=TOKENS_AT_ONCE,
        BLOCK_Q=columns,
        PRODUCT=product_dtype(queries_THPQ.dtype),
        num_warps=8 if rows == 128 else 4,
    )
    return sums.sum(0)


@triton.jit(do_not_specialize=["tokens"])
def _scores(
    queries,
    keys,
    scores,
    maxima,
    tokens,
    HALVES: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    half = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    token = first + tl.arange(0, BLOCK_T)
    # A thread has every eighth column of a product: columns are dealt such that it has all W of a group, next to which
    # lie those of the other seven.
    column = tl.arange(0, BLOCK_S)
    dealt = column // (NEAR * W) * (NEAR * W) + column % NEAR * W + column // NEAR % W
    column += tl.program_id(1) * BLOCK_S
    dealt += tl.program_id(1) * BLOCK_S
    sums = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for start in range(0, Q, BLOCK_Q):
        feature = start + tl.arange(0, BLOCK_Q)
        there = feature < Q
        mask = (token < tokens)[:, None] & there[None, :]
        query = tl.load(queries + (token * HALVES + half)[:, None] * Q + feature[None, :], mask=mask, other=0.0)
        mask = there[:, None] & (dealt < S)[None, :]
        key = tl.load(keys + (half * S + dealt)[None, :] * Q + feature[:, None], mask=mask, other=0.0)
        sums = tl.dot(query.to(PRODUCT), key.to(PRODUCT), sums, input_precision="tf32x3")
    if W > 1:
        if S % BLOCK_S != 0:
            sums = tl.where((dealt < S)[None, :], sums, float("-inf"))
        groups: tl.constexpr = BLOCK_S // W
        sums = tl.reshape(sums, (BLOCK_T, groups // NEAR, W, NEAR))
        best = tl.reshape(tl.reduce(sums, 2, _larger), (BLOCK_T, groups))
        group = tl.program_id(1) * groups + tl.arange(0, groups)
        mask = (token < tokens)[:, None] & (group < G)[None, :]
        tl.store(maxima + (half * G + group)[None, :] * tokens + token[:, None], best, mask=mask)
        sums = tl.reshape(tl.trans(sums, (0, 1, 3, 2)), (BLOCK_T, BLOCK_S))
    mask = (token < tokens)[:, None] & (column < S)[None, :]
    tl.store(scores + (half * tokens + token)[:, None] * S + column[None, :], sums, mask=mask)


@triton.jit
def _larger(a, b):
    """The larger number, or NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rank(x):
    """A float32 number as an integer of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _with_places(ranks, EXACT: tl.constexpr, C: tl.constexpr):
    """Ranks of C candidates of each column; where they need not be exact, with the candidate in the last digits, the
    first one the largest."""
    if not EXACT:
        ranks = (ranks & -C) | (C - 1 - tl.arange(0, C))[:, None]
    return ranks


@triton.jit
def _places_of_best(ranks, EXACT: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """For every column the places of its K largest ranks, the first ones among equals, as rows."""
    found = tl.zeros((BLOCK_K, ranks.shape[1]), tl.int32)
    for winner in range(K):
        best = tl.expand_dims(tl.max(ranks, 0), 0)
        if EXACT:
            candidate = tl.arange(0, C)[:, None]
            place = tl.expand_dims(tl.min(tl.where(ranks == best, candidate, C - 1), 0), 0)
            ranks = tl.where(candidate == place, LOWEST, ranks)
        else:
            place = C - 1 - (best & (C - 1))
            ranks = tl.where(ranks == best, LOWEST, ranks)
        found = tl.where(tl.arange(0, BLOCK_K)[:, None] == winner, place, found)
    return found


@triton.jit(do_not_specialize=["tokens"])
def _top_columns(
    scores,
    maxima,
    best,
    columns,
    tokens,
    S: tl.constexpr,
    L: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Of rows, through groups of columns if these have more than one."""
    half = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_T
    row = tl.arange(0, BLOCK_T)[None, :]
    exists = row < tokens - first
    winner = tl.arange(0, BLOCK_L)[:, None]
    candidate = tl.arange(0, BLOCK_C)[:, None]
    # What a half has of a block of tokens takes 32-bit offsets, which are half as many registers.
    scores += (half * tokens + first) * S
    columns += half * L * tokens + first
    best += half * L * tokens + first
    out = winner * tokens + row
    written = exists & (winner < L)
    if W > 1:
        group = tl.arange(0, G)[:, None]
        there = exists & (group * W < S)
        numbers = tl.load(maxima + half * G * tokens + first + (group * tokens + row), mask=there, other=0.0)
        ranks = tl.where(there, _rank(numbers), LOWEST)
        tl.store(columns + out, _places_of_best(_with_places(ranks, EXACT, G), EXACT, G, L, BLOCK_L), mask=written)
        tl.debug_barrier()  # what some threads have written, others read
        there = exists & (candidate < L * W)
        column = tl.load(columns + (candidate // W * tokens + row), mask=there, other=0) * W + candidate % W
    else:
        there = exists & (candidate < S)
        column = tl.broadcast_to(candidate, (BLOCK_C, BLOCK_T))
    numbers = tl.load(scores + (row * S + column), mask=there & (column < S), other=0.0)
    ranks = _with_places(tl.where(there & (column < S), _rank(numbers), LOWEST), EXACT, BLOCK_C)
    place = _places_of_best(ranks, EXACT, BLOCK_C, L, BLOCK_L)
    if W > 1:
        group = tl.load(columns + (place // W * tokens + row), mask=written, other=0)
        place = group * W + place % W
        tl.debug_barrier()  # the groups have been read
    tl.store(columns + out, place, mask=written)
    tl.store(best + out, tl.load(scores + (row * S + place), mask=written, other=0.0), mask=written)


@triton.jit(do_not_specialize=["tokens"])
def _top_sums(
    best,
    columns,
    firsts,
    seconds,
    scores,
    ids,
    tokens,
    H: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    first_token = tl.program_id(0).to(tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)[None, :]
    exists = row < tokens - first_token
    candidate = tl.arange(0, BLOCK_C)
    there = candidate < C
    best += head * 2 * L * tokens + first_token
    columns += head * 2 * L * tokens + first_token
    right = L * tokens
    first = tl.load(firsts + candidate, mask=there, other=0)[:, None]
    second = tl.load(seconds + candidate, mask=there, other=0)[:, None]
    inside = there[:, None] & exists
    sums = tl.load(best + (first * tokens + row), mask=inside, other=0.0)
    sums += tl.load(best + (right + second * tokens + row), mask=inside, other=0.0)
    ranks = _with_places(tl.where(inside, _rank(sums), LOWEST), EXACT, BLOCK_C)
    place = _places_of_best(ranks, EXACT, BLOCK_C, K, BLOCK_K)
    winner = tl.arange(0, BLOCK_K)[:, None]
    written = exists & (winner < K)
    left = tl.load(firsts + place, mask=written, other=0) * tokens + row
    right += tl.load(seconds + place, mask=written, other=0) * tokens + row
    score = tl.load(best + left, mask=written, other=0.0) + tl.load(best + right, mask=written, other=0.0)
    expert = tl.load(columns + left, mask=written, other=0).to(tl.int64) * S
    expert += tl.load(columns + right, mask=written, other=0)
    out = ((first_token + row) * H + head) * K + winner
    tl.store(scores + out, score, mask=written)
    tl.store(ids + out, expert, mask=written)


@triton.jit
def _winners_sub_keys(
    grads,
    ids,
    keys,
    out,
    H: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1)
    feature = tl.arange(0, BLOCK_Q)
    inside = feature < Q
    first_row = (query % H * 2 + half) * S
    sums = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
    for start in range(0, K, BLOCK_K):
        winner = start + tl.arange(0, BLOCK_K)
        there = winner < K
        row = first_row + _sub_key(tl.load(ids + query * K + winner, mask=there, other=0), half, S)
        grad = tl.load(grads + query * K + winner, mask=there, other=0.0).to(tl.float32)
        mask = there[:, None] & inside[None, :]
        key = tl.load(keys + row[:, None] * Q + feature[None, :], mask=mask, other=0.0)
        sums += grad[:, None] * key.to(tl.float32)
    result = tl.sum(sums, 0).to(out.dtype.element_ty)
    tl.store(out + (query * 2 + half) * Q + feature, result, mask=inside)


@triton.jit
def _sub_key(ids, half, S: tl.constexpr):
    """The sub-keys of one half of experts."""
    if half == 0:
        sub_key = ids // S
    else:
        sub_key = ids % S
    return sub_key


@triton.jit(do_not_specialize=["entries"])
def _half_entries(
    grads, ids, grads_out, rows, entries, H: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr
):
    """For every winner two entries, one of each half: its gradient and its sub-key's row."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < entries
    expert = tl.load(ids + entry, mask=exists, other=0)
    grad = tl.load(grads + entry, mask=exists, other=0.0)
    query = entry // K
    first_row = query % H * 2 * S
    place = query * 2 * K + entry % K
    tl.store(rows + place, (first_row + expert // S).to(rows.dtype.element_ty), mask=exists)
    tl.store(rows + place + K, (first_row + S + expert % S).to(rows.dtype.element_ty), mask=exists)
    tl.store(grads_out + place, grad, mask=exists)
    tl.store(grads_out + place + K, grad, mask=exists)


@triton.jit(do_not_specialize=["tokens", "share"])
def _sub_key_sums(
    grads,
    ids,
    queries,
    sums,
    tokens,
    share,
    H: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """The sums over the tokens of one share of them."""
    half = tl.program_id(0) % (2 * H)
    head = half // 2
    feature = tl.program_id(0) // (2 * H) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = feature < Q
    sub_key = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    begin = tl.program_id(2) * share
    total = tl.zeros((BLOCK_S, BLOCK_Q), tl.float32)
    for start in range(begin, tl.minimum(begin + share, tokens), BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        there = token < tokens
        place = (token * H + head) * K
        placed = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
        for winner in tl.static_range(K):  # all loads at once  # pyright: ignore
            grad = tl.load(grads + place + winner, mask=there, other=0.0).to(tl.float32)
            won = _sub_key(tl.load(ids + place + winner, mask=there, other=0), half % 2, S).to(tl.int32)
            placed += tl.where(sub_key[:, None] == won[None, :], grad[None, :], 0.0)
        row = (token * H + head) * 2 + half % 2
        mask = there[:, None] & inside[None, :]
        query = tl.load(queries + row[:, None] * Q + feature[None, :], mask=mask, other=0.0)
        total = add_weighted(placed, query, total, PRODUCT)
    out = sums + ((tl.program_id(2).to(tl.int64) * 2 * H + half) * S + sub_key[:, None]) * Q + feature[None, :]
    tl.store(out, total, mask=(sub_key < S)[:, None] & inside[None, :])
