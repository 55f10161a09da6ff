"""Batch normalization over tokens, by their own statistics: the op, its reference and its gradient.

    y[t] = (x[t] - mean) / sqrt(variance + eps) * weight + bias

with each feature's mean and (biased) variance over the tokens (arXiv 1502.03167, algorithm 1). It also returns the sums
from which running statistics follow, around a center near the mean, so that features far from zero lose no digits.

Legend: `T` tokens, `F` features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from myriad.kernels.registry import computes_directly, differentiates_directly, register, resolve


class Normalized(NamedTuple):
    y_TF: Tensor
    moments_3F: Tensor
    mean_F: Tensor
    inverse_F: Tensor
    """1 / sqrt(variance + eps); mean and it are what the gradient needs, in the dtype of the moments."""


class BatchNormGradients(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor


class BatchNormFunctions(NamedTuple):
    forward: Callable[[Tensor, Tensor, Tensor, Tensor, float], Normalized]
    """Takes tokens, weight, bias, center and eps."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], BatchNormGradients]
    """Takes the gradient of y, tokens, weight, mean, inverse and eps; the vectors' gradients have weight's dtype."""


def batch_norm(
    x_TF: Tensor, weight_F: Tensor, bias_F: Tensor, center_F: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Normalise every feature over the tokens; statistics are float32 at least.

    Args:
        x_TF: tokens of shape (T, F), one at least.
        weight_F, bias_F: gain and shift of shape (F,), of one dtype.
        center_F: near the means, such as the running ones; shape (F,), without a gradient.
        eps: what is added to the variance.

    Returns:
        y of shape (T, F) in the dtype of x; the moments of shape (3, F), float32 (float64 for float64 tokens), without
        a gradient: the number of tokens, and the sums of x - center and of its square.

    Raises:
        ValueError: shapes that do not fit, or no tokens.
    """
    if x_TF.ndim != 2 or len(x_TF) == 0 or any(v.shape != x_TF.shape[1:] for v in (weight_F, bias_F, center_F)):
        raise ValueError(
            "expected tokens (T, F), one at least, and weight, bias and center (F,), not "
            f"{tuple(x_TF.shape)}, {tuple(weight_F.shape)}, {tuple(bias_F.shape)} and {tuple(center_F.shape)}"
        )
    inputs = x_TF.contiguous(), weight_F.contiguous(), bias_F.contiguous(), center_F.contiguous()
    if differentiates_directly(*inputs):
        return _BatchNorm.apply(*inputs, eps)  # pyright: ignore[reportReturnType]
    op = _compute if computes_directly(*inputs) else torch.ops.myriad.batch_norm
    return op(*inputs, eps)[:2]


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _reference_forward(x_TF: Tensor, weight: Tensor, bias: Tensor, center: Tensor, eps: float) -> Normalized:
    dtype, count = _statistics_dtype(x_TF), float(len(x_TF))
    y_TF, mean, inverse = torch.native_batch_norm(
        x_TF, weight.to(dtype), bias.to(dtype), None, None, training=True, momentum=0.0, eps=eps
    )
    shift, var = mean - center, (inverse.square().reciprocal() - eps).clamp(min=0)
    moments_3F = torch.stack((torch.full_like(shift, count), count * shift, count * (var + shift * shift)))
    return Normalized(y_TF, moments_3F, mean, inverse)


def _reference_backward(
    grad_y_TF: Tensor, x_TF: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> BatchNormGradients:
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad_y_TF, x_TF, weight.to(mean.dtype), None, None, mean, inverse, True, eps, [True, True, True]
    )
    return BatchNormGradients(grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype))


# On a CPU PyTorch's own passes are fast: there is no Numba form.
register("batch_norm", "reference", BatchNormFunctions(_reference_forward, _reference_backward), serves=("numba",))


def _functions(x: Tensor, weight: Tensor) -> BatchNormFunctions:
    return resolve("batch_norm", x.device.type, torch.promote_types(x.dtype, weight.dtype))


def _compute(
    x: Tensor, weight: Tensor, bias: Tensor, center: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _functions(x, weight).forward(x, weight, bias, center, eps)


_op = torch.library.custom_op("myriad::batch_norm", _compute, mutates_args=())


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, center: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, dtype = x.shape[1], _statistics_dtype(x)
    moments, mean, inverse = (x.new_empty(shape, dtype=dtype) for shape in ((3, features), features, features))
    return x.new_empty(x.shape), moments, mean, inverse


@torch.library.custom_op("myriad::batch_norm_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _functions(x, weight).backward(grad_y.contiguous(), x, weight, mean, inverse, eps)


@_backward_op.register_fake
def _(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, ctx.eps = inputs
    _, moments, mean, inverse = output
    ctx.mark_non_differentiable(moments, mean, inverse)
    ctx.save_for_backward(x, weight, mean, inverse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 5
    return *torch.ops.myriad.batch_norm_backward(grad_y, *ctx.saved_tensors, ctx.eps), None, None


_op.register_autograd(_backward, setup_context=_setup_context)


class _BatchNorm(torch.autograd.Function):
    """The same op without the dispatcher's way around it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _compute(*inputs)
        _setup_context(ctx, inputs, output)
        return output[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if grads[0] is None:
            return (None,) * 5
        x, weight, mean, inverse = ctx.saved_tensors
        found = _functions(x, weight).backward(grads[0].contiguous(), x, weight, mean, inverse, ctx.eps)
        return *found, None, None
