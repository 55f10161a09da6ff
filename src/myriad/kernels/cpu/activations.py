"""Activations and their derivatives for compiled functions, by number."""

import math
from typing import Any

import numpy as np

from myriad.kernels.cpu.simd import inlined

CODES = {"gelu": 0, "relu": 1, "silu": 2, "none": 3}
HALF, ONE = np.float32(0.5), np.float32(1)
ROOT_HALF = np.float32(math.sqrt(0.5))
PEAK = np.float32(1 / math.sqrt(2 * math.pi))
"""The density of the normal distribution at zero."""


@inlined
def activate(code: int, x: float) -> Any:
    """The value of an activation at a float32."""
    if code == 0:
        return HALF * x * (ONE + np.float32(math.erf(x * ROOT_HALF)))
    if code == 1:
        return max(x, np.float32(0)) if x == x else x
    if code == 2:
        return x / (ONE + np.float32(math.exp(-x)))
    return x


@inlined
def slope(code: int, x: float) -> Any:
    """The derivative of an activation at a float32."""
    if code == 0:
        below = HALF * (ONE + np.float32(math.erf(x * ROOT_HALF)))
        return below + x * PEAK * np.float32(math.exp(-HALF * x * x))
    if code == 1:
        return ONE if x > np.float32(0) else np.float32(0)
    if code == 2:
        share = ONE / (ONE + np.float32(math.exp(-x)))
        return share * (ONE + x * (ONE - share))
    return ONE
