"""Single-neuron experts looked up in tables: the op, its reference and its gradient.

    y[t] = sum over a of weights[t, a] * hidden(down[n] . x[t]) * up[n],    n = ids[t, a]

(arXiv 2407.04153, equation 6). With a gate table the hidden value is act(gate[n] . x[t]) * (down[n] . x[t]).

A sparse table gradient has a size known only at run time, which `torch.compile` cannot trace: that form stays
out of the graph (`table_gradient.py` says when a gradient is sparse). Sums are taken in float32 at least,
whatever the tables' dtype.

Legend: `T` tokens, `A` active experts a token, `N` experts, `D` width, `U` distinct experts of the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from myriad.kernels.bags import bag_dot, bag_sum, in_full_precision
from myriad.kernels.dry import is_dry
from myriad.kernels.registry import computes_directly, differentiates_directly, register, resolve
from myriad.kernels.table_gradient import as_sparse, check_ids, sparse_gradient, table_gradient


class Activation(NamedTuple):
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    """(gradient of the value, argument) -> gradient of the argument"""


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "relu": Activation(F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0)),
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "none": Activation(lambda x: x, lambda grad, x: grad),
}


class Gradients(NamedTuple):
    x: Tensor
    weights: Tensor
    ids: Tensor
    """int64 of shape (U,): the rows of the table gradients; empty where these are whole tables."""
    down: Tensor
    up: Tensor
    gate: Tensor
    """Empty without a gate."""


class ExpertLookupFunctions(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., Gradients]


def expert_lookup(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    down_ND: Tensor,
    up_ND: Tensor,
    gate_ND: Tensor | None = None,
    *,
    activation: str = "gelu",
    sparse: bool | None = None,
) -> Tensor:
    """The weighted sum of the outputs of each token's experts.

    Args:
        x_TD: inputs of shape (T, D).
        ids_TA: experts of each token, int64 of shape (T, A); duplicates count as often as they stand.
        weights_TA: router weights of shape (T, A).
        down_ND, up_ND, gate_ND: tables of shape (N, D); their dtype may differ from the inputs'.
        activation: `gelu` (exact), `relu`, `silu` or `none`.
        sparse: whether the tables' gradients are coalesced sparse tensors; None: `sparse_gradient` decides.

    Returns:
        outputs of shape (T, D) in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or an unknown activation.
        IndexError: an id outside the table.
    """
    _check(
        x_TD,
        ids_TA,
        weights_TA,
        [table for table in (down_ND, up_ND, gate_ND) if table is not None],
        activation,
    )
    if sparse is None:
        sparse = sparse_gradient(ids_TA.shape[0], ids_TA.shape[1], len(down_ND))
    arguments = (x_TD, ids_TA, weights_TA, down_ND, up_ND, gate_ND, activation)
    tensors = (x_TD, ids_TA, weights_TA, down_ND, up_ND)
    if sparse and torch.is_grad_enabled() and not is_dry(x_TD):
        return _sparse_lookup(*arguments)
    if differentiates_directly(*tensors):
        return _Lookup.apply(False, *arguments)  # pyright: ignore[reportReturnType]
    op = _compute if computes_directly(*tensors) else torch.ops.myriad.expert_lookup
    return op(*arguments)[0]


def _check(x: Tensor, ids: Tensor, weights: Tensor, tables: list[Tensor], activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{activation}' (known: {', '.join(ACTIVATIONS)})")
    if x.ndim != 2 or ids.ndim != 2 or ids.shape != weights.shape or len(ids) != len(x):
        raise ValueError(
            "expected x (T, D) and ids and weights (T, A), not "
            f"{tuple(x.shape)}, {tuple(ids.shape)} and {tuple(weights.shape)}"
        )
    shape = (len(tables[0]), x.shape[1])
    if any(table.shape != shape for table in tables):
        raise ValueError(f"every table must have shape (N, {x.shape[1]}), not {[tuple(t.shape) for t in tables]}")


def _reference_forward(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    act = ACTIVATIONS[activation].value
    down_dots_TA = _dots(down, ids, x)
    if gate is None:
        gate_dots_TA = down_dots_TA.new_empty(0)
        hidden_TA = act(down_dots_TA)
    else:
        gate_dots_TA = _dots(gate, ids, x)
        hidden_TA = act(gate_dots_TA) * down_dots_TA
    y_TD = _sum(up, ids, weights.to(hidden_TA.dtype) * hidden_TA)
    return y_TD.to(x.dtype), down_dots_TA, gate_dots_TA


def _dots(table: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    table, ids = in_full_precision(table, ids)
    return bag_dot(table, ids, x)


def _sum(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    table, ids = in_full_precision(table, ids)
    return bag_sum(table, ids, weights)


def _reference_backward(
    grad_y: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    down: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down_dots: Tensor,
    gate_dots: Tensor,
    activation: str,
    sparse: bool,
) -> Gradients:
    act = ACTIVATIONS[activation]
    weights_TA = weights.to(down_dots.dtype)
    out_dots_TA = _dots(up, ids, grad_y)
    grad_hidden_TA = weights_TA * out_dots_TA
    if gate is None:
        hidden_TA = act.value(down_dots)
        grad_down_dots_TA, grad_gate_dots_TA = act.gradient(grad_hidden_TA, down_dots), None
        grad_x_TD = _sum(down, ids, grad_down_dots_TA)
    else:
        gate_value_TA = act.value(gate_dots)
        hidden_TA = gate_value_TA * down_dots
        grad_down_dots_TA = grad_hidden_TA * gate_value_TA
        grad_gate_dots_TA = act.gradient(grad_hidden_TA * down_dots, gate_dots)
        grad_x_TD = _sum(down, ids, grad_down_dots_TA) + _sum(gate, ids, grad_gate_dots_TA)

    rows_U, grad_down = table_gradient(down, ids, grad_down_dots_TA, x, sparse)
    _, grad_up = table_gradient(up, ids, weights_TA * hidden_TA, grad_y, sparse)
    grad_gate = down.new_empty(0)
    if grad_gate_dots_TA is not None and gate is not None:
        _, grad_gate = table_gradient(gate, ids, grad_gate_dots_TA, x, sparse)
    grad_weights_TA = (hidden_TA * out_dots_TA).to(weights.dtype)
    return Gradients(grad_x_TD.to(x.dtype), grad_weights_TA, rows_U, grad_down, grad_up, grad_gate)


register("expert_lookup", "reference", ExpertLookupFunctions(_reference_forward, _reference_backward))


def form_dtype(x: Tensor, table: Tensor) -> torch.dtype:
    """The dtype that decides which form looks up."""
    return torch.promote_types(x.dtype, table.dtype)


def _functions(x: Tensor, table: Tensor) -> ExpertLookupFunctions:
    return resolve("expert_lookup", x.device.type, form_dtype(x, table))


def _compute(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_ids(ids, len(down))
    return _functions(x, down).forward(x, ids, weights, down, up, gate, activation)


_op = torch.library.custom_op("myriad::expert_lookup", _compute, mutates_args=())


@_op.register_fake
def _(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    dots = ids.shape
    dtype = torch.promote_types(down.dtype, torch.float32)
    down_dots = down.new_empty(dots, dtype=dtype)
    return x.new_empty(x.shape), down_dots, down.new_empty(0 if gate is None else dots, dtype=dtype)


@torch.library.custom_op("myriad::expert_lookup_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    down: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down_dots: Tensor,
    gate_dots: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    saved = (x, ids, weights, down, up, gate, down_dots, gate_dots)
    grads = _functions(x, down).backward(grad_y.contiguous(), *saved, activation, False)
    return grads.x, grads.weights, grads.down, grads.up, grads.gate


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    down: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down_dots: Tensor,
    gate_dots: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(like: Tensor) -> Tensor:
        return like.new_empty(like.shape)

    return (
        empty(x),
        empty(weights),
        empty(down),
        empty(up),
        down.new_empty(0) if gate is None else empty(gate),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ids, weights, down, up, gate, ctx.activation = inputs
    ctx.save_for_backward(x, ids, weights, down, up, gate, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # once: activation checkpointing computes them anew for each look
    x, weights, down, up, gate = torch.ops.myriad.expert_lookup_backward(grad_y, *saved, ctx.activation)
    return x, None, weights, down, up, None if saved[5] is None else gate, None


_op.register_autograd(_backward, setup_context=_setup_context)


class _Lookup(torch.autograd.Function):
    """The same op with dense gradients for the tables, or with coalesced sparse ones."""

    @staticmethod
    def forward(ctx: Any, sparse: bool, *inputs: Any) -> Tensor:
        y, down_dots, gate_dots = _compute(*inputs)
        *tensors, ctx.activation = inputs
        ctx.sparse = sparse
        ctx.save_for_backward(*tensors, down_dots, gate_dots)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        saved = ctx.saved_tensors  # once: activation checkpointing computes them anew for each look
        x, down, up, gate = saved[0], *saved[3:6]
        found = _functions(x, down).backward(grads[0].contiguous(), *saved, ctx.activation, ctx.sparse)

        def of_table(grad: Tensor, table: Tensor) -> Tensor:
            return as_sparse(found.ids, grad, table) if ctx.sparse else grad

        gate_grad = None if gate is None else of_table(found.gate, gate)
        return None, found.x, None, found.weights, of_table(found.down, down), of_table(found.up, up), gate_grad, None


# `torch.compiler.disable` would import the compiler, a second, whenever this module is imported.
@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def _sparse_lookup(*arguments: Any) -> Tensor:
    return _Lookup.apply(True, *arguments)  # pyright: ignore[reportReturnType]
