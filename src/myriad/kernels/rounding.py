"""Stochastic rounding to bfloat16, so that steps smaller than a digit are not lost on average.

(Gupta et al., arXiv 1502.02551.) The random bits are a function of a seed, the step and the place in the tensor, so
that a run is the same wherever and however it is computed. The kernels have forms of their own of `random_bits` and
`rounded_by`, equal to these in every bit.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
"""The 32 bits that hashes are taken in."""


def mixed(x: int) -> int:
    """A bijection of 32 bits that leaves no trace of its input (the finalizer of MurmurHash3)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)


def salt_of(seed: int, step: int) -> int:
    """What tells a step's random bits from others', below 2**32."""
    return mixed((seed ^ mixed(step & MASK)) & MASK)


def random_bits(places: Tensor, salt: int) -> Tensor:
    """32 random bits for each place of a tensor, int64: `mixed(place ^ salt)` of the place's low 32 bits."""
    return mixed((places & MASK) ^ salt)  # pyright: ignore


def rounded_by(x: Tensor, bits: Tensor) -> Tensor:
    """float32 numbers as bfloat16: up if the digits that are cut off exceed 2**16 minus the 16 random bits."""
    whole = x.view(torch.int32).long() + bits
    # A number that is not finite stays what it is.
    up = ((whole >> 16) << 16).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), up, x).bfloat16()
