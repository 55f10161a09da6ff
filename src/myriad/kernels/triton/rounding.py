"""What optimizer steps in Triton have in common: moving averages, and `rounding.py`'s bits in 32-bit arithmetic."""

import triton
import triton.language as tl


def signed(salt: int) -> int:
    """The int32 of a salt's bits, so that every step's salt is of one type and runs the same compiled kernel."""
    return salt - 2**32 if salt >= 2**31 else salt


@triton.jit
def moved(old, new, share, NEAR: tl.constexpr):
    """old + share * (new - old), from the nearer end, as `torch.lerp` does: from the old one where share < 0.5."""
    if NEAR:
        result = old + share * (new - old)
    else:
        result = new - (new - old) * (1.0 - share)
    return result


@triton.jit
def random_bits(place, salt):
    """`random_bits` of the reference: the finalizer of MurmurHash3, in uint32."""
    x = place.to(tl.uint32) ^ salt.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def rounded_by(x, random):
    """`rounded_by` of the reference: float32 as bfloat16, up if the digits cut off exceed 2**16 minus the bits."""
    bits = x.to(tl.uint32, bitcast=True)
    up = ((bits + random) & 0xFFFF0000).to(tl.float32, bitcast=True)  # of infinity itself, whose digits are 0
    return tl.where(x == x, up, x).to(tl.bfloat16)
