"""AdamW on bfloat16 weights with bfloat16 moments, all three rounded stochastically.

The expected result of a step is AdamW's in float32 (Loshchilov and Hutter, arXiv 1711.05101). The second moment keeps
its shape: each rounding errs by less than one part in 2**7, without bias, and an average that forgets 1 - beta2 of
itself a step forgets old errors with it. Its relative error settles at 0.8 % for beta2 = 0.95 and 3 % for 0.999, of
which half reaches the step. Rounded to the nearest, it would stand still 20 % off at 0.999.

A tensor is passed over in chunks: no float32 copy of all of it is ever held.
"""

import torch
from torch import Tensor

from myriad.kernels.rounding import MASK, random_bits, rounded_by, salt_of

CHUNK = 2**18
"""Numbers updated at once on a CPU, whose temporaries stay in the cache."""
LARGE_CHUNK = 2**24
"""On other devices: temporaries of a gigabyte, and few launches."""


@torch.no_grad()
def rounded_adamw(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
) -> None:
    """One step, in place.

    Args:
        weight, exp_avg, exp_avg_sq: contiguous bfloat16 tensors of one shape.
        grad: the gradient, of any dtype.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        step: the number of this step, from 1.
        seed: of the rounding, below 2**31.

    Raises:
        ValueError: a tensor that is not bfloat16, or not contiguous.
    """
    state = (weight, exp_avg, exp_avg_sq)
    if any(one.dtype != torch.bfloat16 or not one.is_contiguous() for one in state):
        raise ValueError("weights and moments that are rounded must be contiguous and bfloat16")
    corrections = (1 - betas[0] ** step, 1 - betas[1] ** step)
    salts = (salt_of(seed, step), salt_of(~seed & MASK, step))
    size = CHUNK if weight.device.type == "cpu" else LARGE_CHUNK
    chunks = zip(*(one.view(-1).split(size) for one in state), grad.reshape(-1).split(size), strict=True)
    for number, (w, m, v, g) in enumerate(chunks):
        g = g.float()
        mean = m.float().lerp_(g, 1 - betas[0])
        square = v.float().lerp_(g * g, 1 - betas[1])
        root = (square / corrections[1]).sqrt_().add_(eps)
        new = w.float().mul_(1 - lr * weight_decay).addcdiv_(mean, root, value=-lr / corrections[0])
        first, second = _bits(number * size, len(g), salts, g.device)
        w.copy_(rounded_by(new, first & 0xFFFF))
        m.copy_(rounded_by(mean, first >> 16))
        v.copy_(rounded_by(square, second & 0xFFFF))


def _bits(start: int, count: int, salts: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """32 random bits of two kinds for each of some places in a row."""
    places = torch.arange(start, start + count, device=device)
    return random_bits(places, salts[0]), random_bits(places, salts[1])
