"""`product_key` in Triton: scores of blocks of tokens by tensor cores, then the top k of each row of them.

Scores are float32. Where queries are, tl.dot in "tf32x3" splits each factor in two, which leaves errors of float32's
own size; queries in bfloat16 are multiplied as they are, with keys that lose no more digits than the queries have lost.

A row's top k are found in two steps: its columns are cut into groups, of which the k with the largest maxima hold all
winners; then the winners are taken among these groups' columns. Each step takes maxima one by one, which is exact
whatever the numbers; as a maximum costs the row's length, k above `MOST_WINNERS` and more than `MOST_SUB_KEYS` sub-keys
go to the reference.

The gradient of the sub-keys takes one of two ways: a product of (sub-keys x tokens) gradients, which are put in their
places on the way, and queries, which costs sub-keys x tokens; or sorted entries, as for a table, which does not.

Floats are compared as integers of the same order: NaN ranks above infinity, as in `torch.topk`, and a number is
told from its equals by its place.

Legend: `T` tokens, `H` heads, `P` = 2 halves, `K` retrieved, `S` = side, `Q` width of a half, `C` candidate pairs,
`G` groups of `W` columns, `R` rows.
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
from myriad.kernels.triton.launch import PROGRAMS, TILE, launch
from myriad.kernels.triton.products import add_weighted, product_dtype
from myriad.kernels.triton.segments import Terms, segment_sums, segments

MOST_WINNERS = 64
MOST_SUB_KEYS = 4096
SCORES_PER_BLOCK = 2**26
"""Sub-key scores held at once: 256 MB, so that a layer's step takes few launches."""
NUMBERS_PER_WARP = 1024
"""Scores that one warp ranks at a time: the maxima of several rows are taken together."""
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
    queries, keys = queries_THPQ.contiguous(), keys_HPSQ.contiguous()
    if queries.dtype == torch.bfloat16:
        keys = keys.bfloat16()
    scores_THK = torch.empty(tokens, heads, k, dtype=torch.float32, device=queries.device)
    ids_THK = torch.empty(tokens, heads, k, dtype=torch.int64, device=queries.device)
    pairs = _pairs(k, side, queries.device)
    step = max(1, SCORES_PER_BLOCK // (heads * 2 * side))
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        halves = _sub_key_scores(queries[block], keys)
        best, columns = _top(halves.view(-1, side), min(k, side))
        _top_pairs(best, columns, pairs, side, scores_THK[block], ids_THK[block])
    return scores_THK.to(torch.promote_types(queries_THPQ.dtype, keys_HPSQ.dtype)), ids_THK


def backward(grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys, each in its own dtype: only winners have one, so no score is computed again."""
    if grad_THK.shape[-1] > MOST_WINNERS:
        return reference_backward(grad_THK, ids_THK, queries_THPQ, keys_HPSQ)
    grad_THK, ids_THK = grad_THK.contiguous(), ids_THK.contiguous()
    queries, keys = queries_THPQ.contiguous(), keys_HPSQ.contiguous()
    return _query_gradients(grad_THK, ids_THK, queries, keys), _key_gradients(grad_THK, ids_THK, queries, keys)


FUNCTIONS = ProductKeyFunctions(forward, backward)


@cache
def _pairs(k: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks of the candidate pairs, int32; kept, since to list them on the device is to wait for it."""
    first, second = candidate_pairs(k, side, torch.device("cpu"))
    return first.to(device, torch.int32), second.to(device, torch.int32)


def _sub_key_scores(queries_THPQ: Tensor, keys_HPSQ: Tensor) -> Tensor:
    """Every sub-key's score, float32 of shape (T, H, 2, S)."""
    tokens, heads, _, width = queries_THPQ.shape
    side = keys_HPSQ.shape[2]
    scores = torch.empty(tokens, heads, 2, side, dtype=torch.float32, device=queries_THPQ.device)
    rows = 64 if tokens > 32 else 16
    columns = min(128, max(16, triton.next_power_of_2(side)))
    launch(
        _scores,
        (triton.cdiv(tokens, rows), triton.cdiv(side, columns), heads * 2),
        queries_THPQ,
        keys_HPSQ,
        scores,
        tokens,
        HALVES=heads * 2,
        S=side,
        Q=width,
        BLOCK_T=rows,
        BLOCK_S=columns,
        BLOCK_Q=min(64 if queries_THPQ.dtype == torch.bfloat16 else 32, max(16, triton.next_power_of_2(width))),
        PRODUCT=product_dtype(queries_THPQ.dtype),
        num_warps=4,
        num_stages=2,
    )
    return scores


def _top(scores_RS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers of every row, float32, and their columns, int32: both of shape (R, k)."""
    width, winners = scores_RS.shape[1], triton.next_power_of_2(k)
    # As many groups as columns of the groups that are left: the two steps are equally long.
    groups = triton.next_power_of_2(math.isqrt(triton.next_power_of_2(width) * winners))
    size = triton.next_power_of_2(width) // groups
    if size < 2:
        return _ranked(scores_RS, k)
    _, chosen_RK = _ranked(_group_maxima(scores_RS, groups, size), k)
    return _ranked(scores_RS, k, chosen_RK, size)


def _group_maxima(scores_RS: Tensor, groups: int, size: int) -> Tensor:
    """The largest number of each group of neighbouring columns, float32 of shape (R, groups)."""
    rows, width = scores_RS.shape
    out_RG = torch.empty(rows, groups, dtype=torch.float32, device=scores_RS.device)
    block = max(1, TILE // size)
    options = {"S": width, "G": groups, "W": size, "BLOCK_G": block, "num_warps": 4}
    launch(_maxima, (triton.cdiv(rows * groups, block),), scores_RS, out_RG, rows * groups, **options)
    return out_RG


def _ranked(scores_RS: Tensor, k: int, groups_RK: Tensor | None = None, size: int = 1) -> tuple[Tensor, Tensor]:
    """The k largest numbers of every row, or of some groups of columns of each, and their columns."""
    rows, width = scores_RS.shape
    best = torch.empty(rows, k, dtype=torch.float32, device=scores_RS.device)
    columns = torch.empty(rows, k, dtype=torch.int32, device=scores_RS.device)
    padded = triton.next_power_of_2(width if groups_RK is None else k * size)
    block = min(32, max(1, NUMBERS_PER_WARP // padded))
    launch(
        _top_rows,
        (triton.cdiv(rows, block),),
        scores_RS,
        columns if groups_RK is None else groups_RK,
        best,
        columns,
        rows,
        S=width,
        K=k,
        GROUPED=groups_RK is not None,
        W=size,
        BLOCK_R=block,
        BLOCK_C=padded,
        num_warps=1,  # several would share rows, and wait for each other at every maximum
    )
    return best, columns


def _top_pairs(
    best_RK: Tensor, columns_RK: Tensor, pairs: tuple[Tensor, Tensor], side: int, scores: Tensor, ids: Tensor
):
    """Write the best sums of one score of each half, for rows that are the two halves in turn."""
    rows = len(best_RK) // 2
    padded = triton.next_power_of_2(len(pairs[0]))
    block = max(1, TILE // padded)
    launch(
        _top_sums,
        (triton.cdiv(rows, block),),
        best_RK,
        columns_RK,
        *pairs,
        scores,
        ids,
        rows,
        S=side,
        HALF_K=best_RK.shape[1],
        C=len(pairs[0]),
        K=scores.shape[-1],
        BLOCK_R=block,
        BLOCK_C=padded,
        num_warps=4,
    )


def _query_gradients(grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor) -> Tensor:
    """For each half of a query the sum over its winners of grad * sub-key."""
    heads, _, side, width = keys_HPSQ.shape
    winners = ids_THK.shape[-1]
    out_THPQ = torch.empty_like(queries_THPQ)
    columns = max(16, triton.next_power_of_2(width))
    block = min(triton.next_power_of_2(winners), max(1, TILE // columns))
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
        num_warps=2,
    )
    return out_THPQ


def _key_gradients(grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor) -> Tensor:
    """For each sub-key the sum over its winners of grad * half of a query."""
    narrow = queries_THPQ.dtype == torch.bfloat16
    way = _placed_gradients if narrow and keys_HPSQ.shape[2] <= MOST_PLACED else _sorted_gradients
    return way(grad_THK, ids_THK, queries_THPQ, keys_HPSQ).to(keys_HPSQ.dtype)


def _sorted_gradients(grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor) -> Tensor:
    heads, _, side, width = keys_HPSQ.shape
    sub_keys_THPK = torch.stack((ids_THK // side, ids_THK % side), dim=2)
    first_row_HP = torch.arange(heads * 2, device=ids_THK.device).view(1, heads, 2, 1) * side
    rows_MK = (sub_keys_THPK + first_row_HP).flatten(0, 2)
    grad_MK = grad_THK.unsqueeze(2).expand_as(sub_keys_THPK).flatten(0, 2)
    found = segments(rows_MK, heads * 2 * side, sparse=False)
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
    tokens,
    HALVES: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    half = tl.program_id(2)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = token * HALVES + half
    sums = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for start in range(0, Q, BLOCK_Q):
        feature = start + tl.arange(0, BLOCK_Q)
        there = feature < Q
        mask = (token < tokens)[:, None] & there[None, :]
        query = tl.load(queries + row[:, None] * Q + feature[None, :], mask=mask, other=0.0)
        mask = there[:, None] & (column < S)[None, :]
        key = tl.load(keys + (half * S + column)[None, :] * Q + feature[:, None], mask=mask, other=0.0)
        sums = tl.dot(query.to(PRODUCT), key.to(PRODUCT), sums, input_precision="tf32x3")
    mask = (token < tokens)[:, None] & (column < S)[None, :]
    tl.store(scores + row[:, None] * S + column[None, :], sums, mask=mask)


@triton.jit
def _rank(x):
    """A float32 number as an integer of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(rank):
    """The number of a rank."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _take_best(ranks, places):
    """The largest of every row of ranks, the first place where it stands, and the ranks without it."""
    best = tl.max(ranks, 1)
    place = tl.min(tl.where(ranks == tl.expand_dims(best, 1), places, 0x7FFFFFFF), 1)
    return best, place, tl.where(places == tl.expand_dims(place, 1), LOWEST, ranks)


@triton.jit(do_not_specialize=["groups"])
def _maxima(scores, maxima, groups, S: tl.constexpr, G: tl.constexpr, W: tl.constexpr, BLOCK_G: tl.constexpr):
    """Of groups of all rows, of which each row has G."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    column = (group % G * W)[:, None] + tl.arange(0, W)[None, :]
    inside = (group < groups)[:, None] & (column < S)
    numbers = tl.load(scores + (group // G * S)[:, None] + column, mask=inside, other=0.0)
    ranks = tl.where(inside, _rank(numbers), LOWEST)
    tl.store(maxima + group, _number(tl.max(ranks, 1)), mask=group < groups)


@triton.jit(do_not_specialize=["rows"])
def _top_rows(
    scores,
    chosen,
    best,
    columns,
    rows,
    S: tl.constexpr,
    K: tl.constexpr,
    GROUPED: tl.constexpr,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of rows, or of K groups of W columns of each."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    candidate = tl.arange(0, BLOCK_C)[None, :]
    exists = row < rows
    if GROUPED:
        there = exists[:, None] & (candidate < K * W)
        group = tl.load(chosen + row[:, None] * K + candidate // W, mask=there, other=0)
        column = group * W + candidate % W
        inside = there & (column < S)
    else:
        column = tl.broadcast_to(candidate, (BLOCK_R, BLOCK_C))
        inside = exists[:, None] & (column < S)
    numbers = tl.load(scores + row[:, None] * S + column, mask=inside, other=0.0)
    ranks = tl.where(inside, _rank(numbers), LOWEST)
    for winner in range(K):
        rank, place, ranks = _take_best(ranks, column)
        tl.store(best + row * K + winner, _number(rank), mask=exists)
        tl.store(columns + row * K + winner, place, mask=exists)


@triton.jit(do_not_specialize=["rows"])
def _top_sums(
    best,
    columns,
    firsts,
    seconds,
    scores,
    ids,
    rows,
    S: tl.constexpr,
    HALF_K: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < rows
    candidate = tl.arange(0, BLOCK_C)
    there = candidate < C
    inside = exists[:, None] & there[None, :]
    left = best + 2 * row * HALF_K
    right = left + HALF_K
    first = tl.load(firsts + candidate, mask=there, other=0)
    second = tl.load(seconds + candidate, mask=there, other=0)
    sums = tl.load(left[:, None] + first[None, :], mask=inside, other=0.0)
    sums += tl.load(right[:, None] + second[None, :], mask=inside, other=0.0)
    ranks = tl.where(inside, _rank(sums), LOWEST)
    for winner in range(K):
        rank, place, ranks = _take_best(ranks, candidate[None, :])
        tl.store(scores + row * K + winner, _number(rank), mask=exists)
        left_column = tl.load(columns + 2 * row * HALF_K + tl.load(firsts + place, mask=exists, other=0), mask=exists)
        right_column = tl.load(
            columns + (2 * row + 1) * HALF_K + tl.load(seconds + place, mask=exists, other=0), mask=exists
        )
        tl.store(ids + row * K + winner, left_column.to(tl.int64) * S + right_column, mask=exists)


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
