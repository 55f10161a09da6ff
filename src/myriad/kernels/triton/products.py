"""Weighted sums of rows as products of tensor cores."""

import torch
import triton
import triton.language as tl
from triton import knobs


def product_dtype(dtype: torch.dtype) -> tl.dtype:
    """What tl.dot multiplies numbers of a dtype in. Triton's interpreter takes bfloat16's bits for integers."""
    return tl.bfloat16 if dtype == torch.bfloat16 and not knobs.runtime.interpret else tl.float32


@triton.jit
def add_weighted(weights, rows, sums, PRODUCT: tl.constexpr):
    """sums + weights @ rows, for weights (M, E) in float32 and rows (E, D); a row that is not finite spoils all M sums.

    "tf32x3" splits both factors, which leaves errors of float32's own size; bfloat16 rows take the weights in two parts
    of eight bits each.
    """
    if PRODUCT == tl.bfloat16:  # noqa: SIM300
        rows = rows.to(PRODUCT)
        high = weights.to(PRODUCT)
        sums = tl.dot((weights - high.to(tl.float32)).to(PRODUCT), rows, sums)
        sums = tl.dot(high, rows, sums)
    else:
        sums = tl.dot(weights, rows.to(tl.float32), sums, input_precision="tf32x3")
    return sums
