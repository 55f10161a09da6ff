"""`product_key` in Triton: scores of blocks of tokens by tensor cores, then the top k of each row of them.

Scores are float32: tl.dot in "tf32x3" splits each factor in two, which leaves errors of float32's own size. A row's
top k are taken one by one, each a maximum over the row, which is exact whatever the numbers; as a maximum costs
the row's length, k above `MOST_WINNERS` and more than `MOST_SUB_KEYS` sub-keys go to the reference.

Floats are compared as integers of the same order: NaN ranks above infinity, as in `torch.topk`, and a number is
told from its equals by its place.

Legend: `T` tokens, `H` heads, `P` = 2 halves, `K` retrieved, `S` = side, `Q` width of a half, `C` candidate pairs.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from myriad.kernels.product_key import ProductKeyFunctions, candidate_pairs, reference_forward
from myriad.kernels.triton.bags import bag_sum
from myriad.kernels.triton.launch import TILE, launch
from myriad.kernels.triton.segments import segment_sums, segments

MOST_WINNERS = 64
MOST_SUB_KEYS = 4096
SCORES_PER_BLOCK = 2**24
"""Sub-key scores held at once: 64 MB, of the order of a large GPU's cache."""
LOWEST = tl.constexpr(-(2**31))
"""Below every number's rank."""


def forward(queries_THPQ: Tensor, keys_HPSQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores, in the promoted dtype, and their experts, int64: both of shape (T, H, K)."""
    tokens, heads = queries_THPQ.shape[:2]
    side = keys_HPSQ.shape[2]
    if k > MOST_WINNERS or side > MOST_SUB_KEYS:
        return reference_forward(queries_THPQ, keys_HPSQ, k)
    queries, keys = queries_THPQ.contiguous(), keys_HPSQ.contiguous()
    scores_THK = torch.empty(tokens, heads, k, dtype=torch.float32, device=queries.device)
    ids_THK = torch.empty(tokens, heads, k, dtype=torch.int64, device=queries.device)
    pairs = _pairs(k, side, queries.device)
    step = max(1, SCORES_PER_BLOCK // (heads * 2 * side))
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        halves = _sub_key_scores(queries[block], keys)
        best, columns = _top(halves.view(-1, side), min(k, side))
        _top_pairs(best, columns, pairs, side, scores_THK[block], ids_THK[block])
    return scores_THK.to(torch.promote_types(queries.dtype, keys.dtype)), ids_THK


def backward(grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys, each in its own dtype: only winners have one, so no score is computed again."""
    heads, _, side, width = keys_HPSQ.shape
    # M = T H 2 halves of queries, which retrieved K sub-keys each.
    sub_keys_THPK = torch.stack((ids_THK // side, ids_THK % side), dim=2)
    first_row_HP = torch.arange(heads * 2, device=ids_THK.device).view(1, heads, 2, 1) * side
    rows_MK = (sub_keys_THPK + first_row_HP).flatten(0, 2)
    grad_MK = grad_THK.unsqueeze(2).expand_as(sub_keys_THPK).flatten(0, 2)
    table = keys_HPSQ.reshape(-1, width)
    grad_queries = bag_sum(table, rows_MK, grad_MK).to(queries_THPQ.dtype)
    found = segments(rows_MK, len(table), sparse=False)
    grad_keys = segment_sums(found, grad_MK, queries_THPQ.reshape(-1, width), keys_HPSQ.dtype)
    return grad_queries.view_as(queries_THPQ), grad_keys.view_as(keys_HPSQ)


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
    narrow = queries_THPQ.dtype == keys_HPSQ.dtype == torch.bfloat16
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
        BLOCK_Q=min(32, max(16, triton.next_power_of_2(width))),
        PRECISION="tf32" if narrow else "tf32x3",  # tf32 holds a bfloat16 number whole
        num_warps=4,
        num_stages=3,
    )
    return scores


def _top(scores_RS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers of every row, float32, and their columns, int32: both of shape (R, k)."""
    rows, width = scores_RS.shape
    best = torch.empty(rows, k, dtype=torch.float32, device=scores_RS.device)
    columns = torch.empty(rows, k, dtype=torch.int32, device=scores_RS.device)
    padded = triton.next_power_of_2(width)
    block = max(1, TILE // 4 // padded)
    sizes = {"S": width, "K": k, "BLOCK_R": block, "BLOCK_S": padded}
    # One warp: several would share rows, and wait for each other at every maximum.
    launch(_top_rows, (triton.cdiv(rows, block),), scores_RS, best, columns, rows, **sizes, num_warps=1)
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
    PRECISION: tl.constexpr,
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
        sums = tl.dot(query.to(tl.float32), key.to(tl.float32), sums, input_precision=PRECISION)
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


@triton.jit(do_not_specialize=["rows"])
def _top_rows(
    scores,
    best,
    columns,
    rows,
    S: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_S)[None, :]
    exists = row < rows
    inside = exists[:, None] & (column < S)
    ranks = tl.where(inside, _rank(tl.load(scores + row[:, None] * S + column, mask=inside, other=0.0)), LOWEST)
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
