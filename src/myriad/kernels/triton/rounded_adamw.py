"""`rounded_adamw` in Triton: one pass reads and writes a weight and its moments, and reads the gradient.

Places and salts are the reference's, and so are the random bits. Sums of products differ in the last digit where the
one rounds once (a fused multiply-add) and the other twice: that tips about one rounding in 2**16.
"""

import triton
import triton.language as tl
from torch import Tensor

from myriad.kernels.rounded_adamw import RoundedAdamWFunctions, RoundedStep
from myriad.kernels.triton.launch import launch
from myriad.kernels.triton.rounding import moved, random_bits, rounded_by, signed

BLOCK = 1024
"""Numbers of a program: 16 bytes of bfloat16 a thread of 4 warps."""


def update(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, step: RoundedStep) -> None:
    """One step, in place."""
    tensors = (weight, exp_avg, exp_avg_sq, grad.contiguous())
    numbers = (step.share, step.square_share, step.correction, step.eps, step.kept, step.size)
    arguments = (*tensors, *numbers, *map(signed, step.salts))
    count = weight.numel()
    near = {"NEAR": step.share < 0.5, "SQUARE_NEAR": step.square_share < 0.5}
    options = {**near, "BLOCK": BLOCK, "num_warps": 4}
    whole, rest = divmod(count, BLOCK)
    # Blocks that are whole have no mask: it would make their loads narrow.
    launch(_update, (whole,), *arguments, 0, count, WHOLE=True, **options)
    launch(_update, (min(rest, 1),), *arguments, whole, count, WHOLE=False, **options)


FUNCTIONS = RoundedAdamWFunctions(update)


@triton.jit(
    do_not_specialize=[
        "share",
        "square_share",
        "correction",
        "eps",
        "kept",
        "size",
        "salt",
        "square_salt",
        "first",
        "count",
    ]
)
def _update(
    weight,
    exp_avg,
    exp_avg_sq,
    grad,
    share,
    square_share,
    correction,
    eps,
    kept,
    size,
    salt,
    square_salt,
    first,
    count,
    WHOLE: tl.constexpr,
    NEAR: tl.constexpr,
    SQUARE_NEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = (tl.program_id(0).to(tl.int64) + first) * BLOCK + tl.arange(0, BLOCK)
    if WHOLE:
        inside = None
    else:
        inside = place < count
    gradient = tl.load(grad + place, mask=inside).to(tl.float32)
    mean = moved(tl.load(exp_avg + place, mask=inside).to(tl.float32), gradient, share, NEAR)
    square = moved(
        tl.load(exp_avg_sq + place, mask=inside).to(tl.float32), gradient * gradient, square_share, SQUARE_NEAR
    )
    root = tl.sqrt_rn(tl.div_rn(square, correction)) + eps
    new = tl.load(weight + place, mask=inside).to(tl.float32) * kept - tl.div_rn(mean * size, root)
    random = random_bits(place, salt)
    tl.store(weight + place, rounded_by(new, random & 0xFFFF), mask=inside)
    tl.store(exp_avg + place, rounded_by(mean, random >> 16), mask=inside)
    tl.store(exp_avg_sq + place, rounded_by(square, random_bits(place, square_salt) & 0xFFFF), mask=inside)
