"""Activations of experts and their derivatives, in float32."""

import triton
import triton.language as tl


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The value of `gelu` (exact), `relu`, `silu` or `none`."""
    if ACTIVATION == "gelu":
        y = x * _normal_cdf(x)
    elif ACTIVATION == "silu":
        y = x * _sigmoid(x)
    elif ACTIVATION == "relu":
        y = tl.where(x <= 0, 0.0, x)  # not a maximum, which would hide a NaN
    else:
        tl.static_assert(ACTIVATION == "none")
        y = x
    return y


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative; that of `relu` is 0 at 0."""
    if ACTIVATION == "gelu":
        y = _normal_cdf(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "silu":
        s = _sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "none")
        y = tl.full(x.shape, 1.0, tl.float32)
    return y
