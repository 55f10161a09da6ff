"""`value_lookup` in Triton: a weighted sum of rows; backward, dot products and sorted segments."""

from torch import Tensor

from myriad.kernels.triton.bags import bag_dot, bag_sum
from myriad.kernels.triton.segments import Terms, segment_sums, segments
from myriad.kernels.value_lookup import ValueGradients, ValueLookupFunctions


def forward(ids: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """y of shape (T, D) in the weights' dtype."""
    return bag_sum(values, ids, weights).to(weights.dtype)


def backward(grad_y: Tensor, ids: Tensor, weights: Tensor, values: Tensor, sparse: bool) -> ValueGradients:
    """The gradients of weights and table, each in its own dtype."""
    grad_weights = bag_dot(values, ids, grad_y)
    found = segments(ids, len(values), sparse)
    (grad_values,) = segment_sums(found, Terms(weights, grad_y, values.dtype))
    return ValueGradients(grad_weights.to(weights.dtype), found.ids_U, grad_values)


FUNCTIONS = ValueLookupFunctions(forward, backward)
