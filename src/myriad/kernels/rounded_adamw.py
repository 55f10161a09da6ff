"""AdamW on bfloat16 weights with bfloat16 moments, all three rounded stochastically.

The expected result of a step is AdamW's in float32 (Loshchilov and Hutter, arXiv 1711.05101). The second moment keeps
its shape: each rounding errs by less than one part in 2**7, without bias, and an average that forgets 1 - beta2 of
itself a step forgets old errors with it. Its relative error settles at 0.8 % for beta2 = 0.95 and 3 % for 0.999, of
which half reaches the step. Rounded to the nearest, it would stand still 20 % off at 0.999.

No form ever holds a float32 copy of a whole tensor: the reference passes over it in chunks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from myriad.kernels.registry import register, resolve
from myriad.kernels.rounding import MASK, random_bits, rounded_by, salt_of

CHUNK = 2**18
"""Numbers updated at once on a CPU, whose temporaries stay in the cache."""
LARGE_CHUNK = 2**24
"""On other devices: temporaries of a gigabyte, and few launches."""


class RoundedStep(NamedTuple):
    """The numbers of one step, as they enter its arithmetic."""

    share: float
    """The gradient's, in the new first moment."""
    square_share: float
    """Its square's, in the new second moment."""
    correction: float
    """What the second moment is divided by: its bias correction."""
    eps: float
    kept: float
    """What decay leaves of a weight."""
    size: float
    """The learning rate with the first moment's bias correction in it."""
    salts: tuple[int, int]
    """What tells this step's random bits, of two kinds, from others': below 2**32."""


class RoundedAdamWFunctions(NamedTuple):
    """It takes the weight, its moments, the gradient and the step."""

    update: Callable[[Tensor, Tensor, Tensor, Tensor, RoundedStep], None]


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
        grad: the gradient, of that shape and of any dtype.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        step: the number of this step, from 1.
        seed: of the rounding, below 2**31.

    Raises:
        ValueError: a weight or moment that is not bfloat16 or not contiguous, or tensors of several shapes.
    """
    state = (weight, exp_avg, exp_avg_sq)
    if any(one.dtype != torch.bfloat16 or not one.is_contiguous() for one in state):
        raise ValueError("weights and moments that are rounded must be contiguous and bfloat16")
    if any(one.shape != weight.shape for one in (exp_avg, exp_avg_sq, grad)):
        raise ValueError(f"moments and gradient must have the weight's shape {tuple(weight.shape)}")
    numbers = RoundedStep(
        share=1 - betas[0],
        square_share=1 - betas[1],
        correction=1 - betas[1] ** step,
        eps=eps,
        kept=1 - lr * weight_decay,
        size=lr / (1 - betas[0] ** step),
        salts=(salt_of(seed, step), salt_of(~seed & MASK, step)),
    )
    resolve("rounded_adamw", weight.device.type, weight.dtype).update(*state, grad, numbers)


def _reference(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, step: RoundedStep) -> None:
    size = CHUNK if weight.device.type == "cpu" else LARGE_CHUNK
    chunks = zip(*(one.reshape(-1).split(size) for one in (weight, exp_avg, exp_avg_sq, grad)), strict=True)
    for number, (w, m, v, g) in enumerate(chunks):
        g = g.float()
        mean = m.float().lerp_(g, step.share)
        square = v.float().lerp_(g * g, step.square_share)
        root = (square / step.correction).sqrt_().add_(step.eps)
        new = w.float().mul_(step.kept).addcdiv_(mean, root, value=-step.size)
        first, second = _bits(number * size, len(g), step.salts, g.device)
        w.copy_(rounded_by(new, first & 0xFFFF))
        m.copy_(rounded_by(mean, first >> 16))
        v.copy_(rounded_by(square, second & 0xFFFF))


def _bits(start: int, count: int, salts: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """32 random bits of two kinds for each of some places in a row."""
    places = torch.arange(start, start + count, device=device)
    return random_bits(places, salts[0]), random_bits(places, salts[1])


register("rounded_adamw", "reference", RoundedAdamWFunctions(_reference), serves=("numba",))
