"""Values looked up in a table, as product-key memories do: the op, its reference and its gradient.

    y[t] = sum over a of weights[t, a] * values[ids[t, a]]

(arXiv 1907.05242, equation 2). Its table gradient is sparse or dense as `table_gradient.py` says.

Legend: `T` tokens, `A` values a token, `N` rows of the table, `D` width, `U` distinct rows of the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from myriad.kernels.bags import bag_dot, bag_sum, in_full_precision
from myriad.kernels.dry import is_dry
from myriad.kernels.registry import computes_directly, differentiates_directly, register, resolve
from myriad.kernels.table_gradient import as_sparse, check_ids, sparse_gradient, table_gradient


class ValueGradients(NamedTuple):
    weights: Tensor
    ids: Tensor
    """int64 of shape (U,): the rows of the table's gradient; empty where it is a whole table."""
    values: Tensor


class ValueLookupFunctions(NamedTuple):
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, bool], ValueGradients]


def value_lookup(ids_TA: Tensor, weights_TA: Tensor, values_ND: Tensor, *, sparse: bool | None = None) -> Tensor:
    """The weighted sum of each token's values.

    Args:
        ids_TA: rows of each token, int64 of shape (T, A); duplicates count as often as they stand.
        weights_TA: weights of shape (T, A).
        values_ND: a table of shape (N, D); its dtype may differ from the weights'.
        sparse: whether the table's gradient is a coalesced sparse tensor; None: `sparse_gradient` decides.

    Returns:
        outputs of shape (T, D) in the dtype of the weights.

    Raises:
        ValueError: shapes that do not fit.
        IndexError: an id outside the table.
    """
    if ids_TA.ndim != 2 or ids_TA.shape != weights_TA.shape or values_ND.ndim != 2:
        raise ValueError(
            "expected ids and weights (T, A) and values (N, D), not "
            f"{tuple(ids_TA.shape)}, {tuple(weights_TA.shape)} and {tuple(values_ND.shape)}"
        )
    if sparse is None:
        sparse = sparse_gradient(ids_TA.shape[0], ids_TA.shape[1], len(values_ND))
    if sparse and torch.is_grad_enabled() and not is_dry(ids_TA):
        return _sparse_lookup(ids_TA, weights_TA, values_ND)
    if differentiates_directly(ids_TA, weights_TA, values_ND):
        return _Lookup.apply(False, ids_TA, weights_TA, values_ND)  # pyright: ignore[reportReturnType]
    op = _compute if computes_directly(ids_TA, weights_TA, values_ND) else torch.ops.myriad.value_lookup
    return op(ids_TA, weights_TA, values_ND)


def _reference_forward(ids: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    table, places = in_full_precision(values, ids)
    return bag_sum(table, places, weights).to(weights.dtype)


def _reference_backward(grad_y: Tensor, ids: Tensor, weights: Tensor, values: Tensor, sparse: bool) -> ValueGradients:
    table, places = in_full_precision(values, ids)
    grad_weights_TA = bag_dot(table, places, grad_y).to(weights.dtype)
    rows_U, grad_values = table_gradient(values, ids, weights.to(table.dtype), grad_y, sparse)
    return ValueGradients(grad_weights_TA, rows_U, grad_values)


register("value_lookup", "reference", ValueLookupFunctions(_reference_forward, _reference_backward))


def _functions(weights: Tensor, values: Tensor) -> ValueLookupFunctions:
    return resolve("value_lookup", values.device.type, torch.promote_types(weights.dtype, values.dtype))


def _compute(ids: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    check_ids(ids, len(values))
    return _functions(weights, values).forward(ids, weights, values)


_op = torch.library.custom_op("myriad::value_lookup", _compute, mutates_args=())


@_op.register_fake
def _(ids: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    return weights.new_empty(len(ids), values.shape[1])


@torch.library.custom_op("myriad::value_lookup_backward", mutates_args=())
def _backward_op(grad_y: Tensor, ids: Tensor, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    found = _functions(weights, values).backward(grad_y.contiguous(), ids, weights, values, False)
    return found.weights, found.values


@_backward_op.register_fake
def _(grad_y: Tensor, ids: Tensor, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), values.new_empty(values.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None
    return None, *torch.ops.myriad.value_lookup_backward(grad_y, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_setup_context)


class _Lookup(torch.autograd.Function):
    """The same op with a dense gradient for the table, or with a coalesced sparse one."""

    @staticmethod
    def forward(ctx: Any, sparse: bool, *inputs: Any) -> Tensor:
        ctx.sparse = sparse
        ctx.save_for_backward(*inputs)
        return _compute(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        ids, weights, values = ctx.saved_tensors
        found = _functions(weights, values).backward(grads[0].contiguous(), ids, weights, values, ctx.sparse)
        grad_values = as_sparse(found.ids, found.values, values) if ctx.sparse else found.values
        return None, None, found.weights, grad_values


# `torch.compiler.disable` would import the compiler, a second, whenever this module is imported.
@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def _sparse_lookup(*arguments: Tensor) -> Tensor:
    return _Lookup.apply(True, *arguments)  # pyright: ignore[reportReturnType]
