"""Arithmetic as the rules need it, exact or fast, and as the codecs need it, the same bits in both."""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

PROPAGATE = tl.constexpr(tl.PropagateNan.ALL)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Adding this rounds |x| < 2**22 to an integer, to nearest even, which is then the sum's lower bits.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def div(x, y, EXACT: tl.constexpr):
    """Correctly rounded, or within 2 ulp."""
    if EXACT:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def sqrt(x, EXACT: tl.constexpr):
    """Correctly rounded, or approximate."""
    if EXACT:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def maximum(x, y):
    """The larger one; NaN if either is."""
    return tl.maximum(x, y, propagate_nan=PROPAGATE)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def times(x, y):
    """A product that is rounded before anything is added to it, in fast arithmetic too."""
    if INTERPRETED:
        return x * y
    else:
        return libdevice.mul_rn(x, y)


@triton.jit
def minus(x, y):
    """A difference of rounded values, in fast arithmetic too."""
    if INTERPRETED:
        return x - y
    else:
        return libdevice.sub_rn(x, y)


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x):
    """The integer nearest to ``|x| < 2**22``, ties to even."""
    return (x + ROUNDER).to(tl.int32, bitcast=True) - 0x4B400000
