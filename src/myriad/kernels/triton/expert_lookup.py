"""`expert_lookup` in Triton: two passes over tables each way.

Forward, the dot products with the down (and gate) rows, from which come the hidden values; then the weighted sum of
the up rows. Backward, the dot products of the up rows with the gradient of y, from which come the gradients of all
dot products and weights; then the weighted sum of the down rows, and the tables' gradients by sorted segments.
Between the passes only numbers per token and expert are kept: each row that is looked up is read once a pass.

Legend: `T` tokens, `A` active experts a token, `N` experts, `D` width, `U` distinct experts of the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from myriad.kernels.expert_lookup import ExpertLookupFunctions, Gradients
from myriad.kernels.triton.activations import activate, slope
from myriad.kernels.triton.bags import bag_sum, entries_of, row_dots
from myriad.kernels.triton.launch import dot_blocks, launch
from myriad.kernels.triton.segments import Terms, segment_sums, segments


def forward(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y of shape (T, D) in x's dtype, and the dot products with down and gate rows, float32 of shape (T, A)."""
    x, ids, weights, down, up, gate = _contiguous(x, ids, weights, down, up, gate)
    down_dots = torch.empty(ids.shape, dtype=torch.float32, device=x.device)
    gate_dots = down_dots.new_empty(0 if gate is None else ids.shape)
    coefficients = torch.empty_like(down_dots)
    grid, blocks = dot_blocks(ids, x.shape[1])
    arguments = (down, down if gate is None else gate, ids, x, weights, down_dots, gate_dots, coefficients)
    launch(_hidden, grid, *arguments, GATED=gate is not None, ACTIVATION=activation, **blocks)
    return bag_sum(up, ids, coefficients).to(x.dtype), down_dots, gate_dots


def backward(
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
    """The gradients of x, weights and tables, each in its own dtype."""
    x, ids, weights, down, up, gate = _contiguous(x, ids, weights, down, up, gate)
    grad_weights = torch.empty_like(weights)
    # For each token and expert: what multiplies grad_y in the up row's gradient, x in the down and the gate row's.
    up_terms, down_terms = torch.empty_like(down_dots), torch.empty_like(down_dots)
    gate_terms = torch.empty_like(gate_dots)
    grid, blocks = dot_blocks(ids, x.shape[1])
    arguments = (up, ids, grad_y, weights, down_dots, gate_dots, grad_weights, up_terms, down_terms, gate_terms)
    launch(_hidden_gradients, grid, *arguments, GATED=gate is not None, ACTIVATION=activation, **blocks)

    grad_x = bag_sum(down, ids, down_terms)
    found = segments(ids, len(down), sparse)
    grad_down, grad_up = segment_sums(found, Terms(down_terms, x, down.dtype), Terms(up_terms, grad_y, up.dtype))
    grad_gate = down.new_empty(0)
    if gate is not None:
        grad_x += bag_sum(gate, ids, gate_terms)
        (grad_gate,) = segment_sums(found, Terms(gate_terms, x, gate.dtype))
    return Gradients(grad_x.to(x.dtype), grad_weights, found.ids_U, grad_down, grad_up, grad_gate)


FUNCTIONS = ExpertLookupFunctions(forward, backward)


def _contiguous(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs with rows in a row; those that are so already, as tables always are in training, stay themselves."""
    gate = None if gate is None else gate.contiguous()
    return x.contiguous(), ids.contiguous(), weights.contiguous(), down.contiguous(), up.contiguous(), gate


@triton.jit
def _hidden(
    down,
    gate,
    ids,
    x,
    weights,
    down_dots,
    gate_dots,
    coefficients,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Dot products, and weight times hidden value."""
    token, places, exists, rows = entries_of(ids, A, BLOCK_A)
    dots = row_dots(down, rows, exists, x, token, D, BLOCK_A, BLOCK_D)
    tl.store(down_dots + places, dots, mask=exists)
    if GATED:
        gates = row_dots(gate, rows, exists, x, token, D, BLOCK_A, BLOCK_D)
        tl.store(gate_dots + places, gates, mask=exists)
        hidden = activate(gates, ACTIVATION) * dots
    else:
        hidden = activate(dots, ACTIVATION)
    weight = tl.load(weights + places, mask=exists, other=0.0).to(tl.float32)
    tl.store(coefficients + places, weight * hidden, mask=exists)


@triton.jit
def _hidden_gradients(
    up,
    ids,
    grad_y,
    weights,
    down_dots,
    gate_dots,
    grad_weights,
    up_terms,
    down_terms,
    gate_terms,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Through the output's dot products with up rows to the gradients of weights, hidden values and dot products."""
    token, places, exists, rows = entries_of(ids, A, BLOCK_A)
    out_dots = row_dots(up, rows, exists, grad_y, token, D, BLOCK_A, BLOCK_D)
    weight = tl.load(weights + places, mask=exists, other=0.0).to(tl.float32)
    dots = tl.load(down_dots + places, mask=exists, other=0.0)
    grad_hidden = weight * out_dots
    if GATED:
        gates = tl.load(gate_dots + places, mask=exists, other=0.0)
        value = activate(gates, ACTIVATION)
        hidden = value * dots
        tl.store(down_terms + places, grad_hidden * value, mask=exists)
        tl.store(gate_terms + places, grad_hidden * dots * slope(gates, ACTIVATION), mask=exists)
    else:
        hidden = activate(dots, ACTIVATION)
        tl.store(down_terms + places, grad_hidden * slope(dots, ACTIVATION), mask=exists)
    tl.store(up_terms + places, weight * hidden, mask=exists)
    tl.store(grad_weights + places, (hidden * out_dots).to(grad_weights.dtype.element_ty), mask=exists)
