"""The exponential function for loops over rows: without branches and calls, so that they run in vectors."""

from typing import Any

import numpy as np

from myriad.kernels.cpu.simd import float_of, inlined_as_written, nearest

LOWEST, HIGHEST = np.float32(-87.3), np.float32(88.3)
"""Between these numbers e**x is a normal float32."""
PER_OCTAVE = np.float32(1.4426950408889634)
OCTAVE, REST_OF_OCTAVE = np.float32(0.693359375), np.float32(-2.1219444e-4)
"""Their sum is log 2; products of the first with the exponents of float32 numbers are exact."""
TERMS = tuple(np.float32(term) for term in (0.49999988, 0.16666518, 0.041669533, 0.008368923, 0.0013751382))
"""(e**x - 1 - x) / x**2 by powers of x, fitted by least squares over half an octave either way: off by 4e-9 of e**x."""


@inlined_as_written
def exp(x: float) -> Any:
    """e**x of a float32, with an error of some 1e-7 of it; zero below -87.3, as if x were 88.3 above that.

    e**x = 2**n e**r with n whole and r within half an octave of zero.
    """
    bounded = LOWEST if x < LOWEST else x
    bounded = HIGHEST if bounded > HIGHEST else bounded
    octaves = nearest(bounded * PER_OCTAVE)
    n = np.float32(octaves)
    r = (bounded - n * OCTAVE) - n * REST_OF_OCTAVE
    a, b, c, d, e = TERMS
    power = np.float32(1) + (r + r * r * (a + r * (b + r * (c + r * (d + r * e)))))
    scaled = power * float_of(np.uint32(octaves + 127) << np.uint32(23))
    return np.float32(0) if x < LOWEST else scaled
