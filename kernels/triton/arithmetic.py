"""Division, square root, maximum and sign as the rules need them, in both arithmetics."""

import triton
import triton.language as tl

PROPAGATE = tl.constexpr(tl.PropagateNan.ALL)


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
