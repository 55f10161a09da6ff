"""Exact top-k over product keys: the op, its reference and its gradient.

N = side * side experts have keys that are pairs of sub-keys (c_i, c'_j); expert i * side + j scores
q1 . c_i + q2 . c'_j (arXiv 1907.05242, section 3; arXiv 2407.04153, section 2.2). The top k of all N sums lie
among the pairs of the top k of each half, because a pair beaten by k others in one half is beaten in the sum.

Legend: `T` tokens, `H` heads, `P` = 2 halves, `K` retrieved, `S` = side, `Q` width of a half (d_key).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from myriad.kernels.bags import bag_sum, row_sums
from myriad.kernels.registry import computes_directly, differentiates_directly, register, resolve

SCORES_PER_BLOCK = 2**20
"""Sub-key scores held at once by the reference: 4 MB in float32, so that a block stays in the cache."""


class ProductKeyFunctions(NamedTuple):
    forward: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def product_key(queries_THPQ: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of every head.

    Args:
        queries_THPQ: queries of shape (T, H, 2, d_key).
        keys: sub-keys of shape (2, side, d_key), shared by the heads, or (H, 2, side, d_key).
        k: experts to retrieve, at most side * side.

    Returns:
        scores of shape (T, H, k), decreasing, in the promoted dtype of queries and keys, and the experts'
        ids, int64, of the same shape. Gradients reach the winners' queries and keys only.

    Raises:
        ValueError: shapes that do not fit, or k out of range.
    """
    _check(queries_THPQ, keys, k)
    op = _op_for(queries_THPQ, keys)
    if keys.ndim == 4:
        return op(queries_THPQ, keys, k)
    # Heads that share their keys are more tokens of one head.
    tokens, heads, _, width = queries_THPQ.shape
    scores, ids = op(queries_THPQ.reshape(tokens * heads, 1, 2, width), keys.unsqueeze(0), k)
    return scores.view(tokens, heads, k), ids.view(tokens, heads, k)


def _op_for(queries: Tensor, keys: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    if differentiates_directly(queries, keys):
        return _Retrieval.apply  # pyright: ignore[reportReturnType]
    return _compute if computes_directly(queries, keys) else torch.ops.myriad.product_key


def _check(queries: Tensor, keys: Tensor, k: int) -> None:
    if queries.ndim != 4 or queries.shape[2] != 2:
        raise ValueError(f"queries must have shape (T, H, 2, d_key), not {tuple(queries.shape)}")
    heads, width = queries.shape[1], queries.shape[3]
    per_head = keys.ndim == 4
    if keys.ndim not in (3, 4) or keys.shape[-3] != 2 or keys.shape[-1] != width or (per_head and len(keys) != heads):
        raise ValueError(
            f"keys must have shape (2, side, {width}) or ({heads}, 2, side, {width}), not {tuple(keys.shape)}"
        )
    if not 1 <= k <= keys.shape[-2] ** 2:
        raise ValueError(f"k must lie between 1 and {keys.shape[-2] ** 2} (the number of experts), not {k}")


def reference_forward(queries_THPQ: Tensor, keys_HPSQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    tokens, heads = queries_THPQ.shape[:2]
    side = keys_HPSQ.shape[2]
    dtype = torch.promote_types(queries_THPQ.dtype, keys_HPSQ.dtype)
    keys_HPQS = keys_HPSQ.to(dtype).transpose(2, 3)
    scores_THK = torch.empty(tokens, heads, k, dtype=dtype, device=queries_THPQ.device)
    ids_THK = torch.empty(tokens, heads, k, dtype=torch.int64, device=queries_THPQ.device)
    candidates = candidate_pairs(k, side, queries_THPQ.device)
    step = max(1, SCORES_PER_BLOCK // (heads * 2 * side))
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        # Autocast reaches into custom ops: it would round the scores to bfloat16.
        with torch.autocast(queries_THPQ.device.type, enabled=False):
            halves_HPTS = queries_THPQ[block].to(dtype).permute(1, 2, 0, 3) @ keys_HPQS
        best_HTK, ids_HTK = _best_sums(halves_HPTS, k, candidates)
        scores_THK[block], ids_THK[block] = best_HTK.transpose(0, 1), ids_HTK.transpose(0, 1)
    return scores_THK, ids_THK


def _best_sums(halves_HPTS: Tensor, k: int, candidates: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The k best sums of one score of each half, and i * side + j for each."""
    side = halves_HPTS.shape[-1]
    best, index = halves_HPTS.topk(min(k, side), dim=-1)
    first, second = candidates
    sums = best[:, 0, :, first] + best[:, 1, :, second]
    scores, pick = sums.topk(k, dim=-1)
    ids = index[:, 0].gather(-1, first[pick]) * side + index[:, 1].gather(-1, second[pick])
    return scores, ids


def candidate_pairs(k: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (a, b) in the two sorted halves that can be among the k best sums.

    (a + 1) * (b + 1) - 1 other pairs score at least as much as (a, b), so it needs (a + 1) * (b + 1) <= k.
    """
    rank = torch.arange(1, min(k, side) + 1, device=device)
    first, second = (rank[:, None] * rank[None, :] <= k).nonzero(as_tuple=True)
    return first, second


def reference_backward(
    grad_THK: Tensor, ids_THK: Tensor, queries_THPQ: Tensor, keys_HPSQ: Tensor
) -> tuple[Tensor, Tensor]:
    heads, _, side, width = keys_HPSQ.shape
    dtype = torch.promote_types(queries_THPQ.dtype, keys_HPSQ.dtype)
    sub_keys_THPK = torch.stack((ids_THK // side, ids_THK % side), dim=2)
    first_row_HP = torch.arange(heads * 2, device=ids_THK.device).view(1, heads, 2, 1) * side
    rows_MK = (sub_keys_THPK + first_row_HP).flatten(0, 2)
    grad_MK = grad_THK.unsqueeze(2).expand_as(sub_keys_THPK).flatten(0, 2).to(dtype)
    table = keys_HPSQ.reshape(-1, width).to(dtype)
    grad_queries = bag_sum(table, rows_MK, grad_MK).view_as(queries_THPQ)
    grad_keys = row_sums(len(table), rows_MK, grad_MK, queries_THPQ.reshape(-1, width).to(dtype)).view_as(keys_HPSQ)
    return grad_queries.to(queries_THPQ.dtype), grad_keys.to(keys_HPSQ.dtype)


register("product_key", "reference", ProductKeyFunctions(reference_forward, reference_backward))


def _functions(queries: Tensor, keys: Tensor) -> ProductKeyFunctions:
    return resolve("product_key", queries.device.type, torch.promote_types(queries.dtype, keys.dtype))


def _compute(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _functions(queries, keys).forward(queries, keys, k)


_op = torch.library.custom_op("myriad::product_key", _compute, mutates_args=())


@_op.register_fake
def _(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:2], k)
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    return queries.new_empty(shape, dtype=dtype), queries.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("myriad::product_key_backward", mutates_args=())
def _backward_op(grad: Tensor, ids: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    return _functions(queries, keys).backward(grad, ids, queries, keys)


@_backward_op.register_fake
def _(grad: Tensor, ids: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(keys)


def _setup_context(ctx, inputs, output) -> None:
    queries, keys, _ = inputs
    ctx.save_for_backward(queries, keys, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_scores: Tensor | None, grad_ids: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_scores is None:
        return None, None, None
    queries, keys, ids = ctx.saved_tensors
    return *torch.ops.myriad.product_key_backward(grad_scores, ids, queries, keys), None


_op.register_autograd(_backward, setup_context=_setup_context)


class _Retrieval(torch.autograd.Function):
    """The same op outside graphs."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        output = _compute(queries, keys, k)
        _setup_context(ctx, (queries, keys, k), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if grads[0] is None:
            return None, None, None
        queries, keys, ids = ctx.saved_tensors
        return *_functions(queries, keys).backward(grads[0], ids, queries, keys), None
