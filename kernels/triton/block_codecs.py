"""The codecs of 8 and 4 bits: ``<name>_value(code, table)`` and ``<name>_code(n, table)``.

Both are in units of the block's scale, codes are uint32 or int32, ``table`` is the address of the codec's
lookup table if it has one. Magnitudes of ``n`` exceed 1 by no more than the rounding of a scale.
"""

import numpy as np
import triton
import triton.language as tl

from ..lookup import GUESS_BASE as _GUESS_BASE
from ..lookup import SIGNED_FOUR_BITS
from .arithmetic import bits_of, float_of, quotient, root, rounded, times

_MAGNITUDES = np.array(SIGNED_FOUR_BITS, np.float32)[7:]
_MIDDLES = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / np.float32(2)
FOUR_BIT_MIDDLES = tl.constexpr(tuple(map(int, _MIDDLES.view(np.int32))))
GUESS_BASE = tl.constexpr(_GUESS_BASE)
ONE_448TH = tl.constexpr(float(np.float32(1 / 448)))
ONE_65025TH = tl.constexpr(float(np.float32(1 / 65025)))


@triton.jit
def _float(code, OFFSET: tl.constexpr):
    """``code + OFFSET`` exactly; cheaper than the GPU's conversion."""
    return float_of(code.to(tl.uint32) | 0x4B000000) + (OFFSET - 8388608.0)


@triton.jit
def _at_least_one(code, n):
    """A second moment that is not zero never becomes zero: dividing by it would blow the step up."""
    return tl.maximum(code, tl.minimum(n.to(tl.int32, bitcast=True), 1))


@triton.jit
def _middle_index(n, table):
    """How many middles of a dynamic map are below ``n``: a guess from its upper bits, and one comparison."""
    upper = tl.maximum((n.to(tl.int32, bitcast=True) >> 16) - GUESS_BASE, 0)
    guess = tl.load((table + 2048).to(tl.pointer_type(tl.uint8)) + upper).to(tl.int32)
    middle = tl.load((table + 1024).to(tl.pointer_type(tl.float32)) + guess)
    return tl.where(n > middle, guess + 1, guess)


@triton.jit
def int8_value(code, table):
    return tl.load(table.to(tl.pointer_type(tl.float32)) + code)


@triton.jit
def int8_code(n, table):
    m = _middle_index(tl.abs(n), table)
    return 127 + tl.where(n < 0, tl.maximum(-m, -127), m)


int8_unsigned_value = int8_value


@triton.jit
def int8_unsigned_code(n, table):
    return _at_least_one(_middle_index(n, table), n)


@triton.jit
def int8_companded_value(code, table):
    q = _float(code ^ 0x80, -128.0)
    return quotient(q, 254.0 - tl.abs(q))


@triton.jit
def int8_companded_code(n, table):
    return rounded(quotient(times(n, 254.0), tl.abs(n) + 1.0))


@triton.jit
def int8_companded_unsigned_value(code, table):
    q = _float(code, 0.0)
    return times(times(q, q), ONE_65025TH)


@triton.jit
def int8_companded_unsigned_code(n, table):
    # What is raised to the limit of root() has code 0 all the same.
    return _at_least_one(rounded(times(root(tl.maximum(n, 2.0**-19)), 255.0)), n)


@triton.jit
def fp8_value(code, table):
    # Exponent and mantissa where fp32 has them are the value times 2**-120, a denormal sometimes.
    bits = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
    return times(float_of(bits), ONE_448TH * 2.0**120)


@triton.jit
def _e4m3(n):
    """The magnitude's code: adding 2**20 times its power of two leaves 3 bits of mantissa."""
    x = tl.minimum(times(tl.abs(n), 448.0), 448.0)
    power = tl.maximum(bits_of(x) & 0x7F800000, (127 - 6) << 23) + (20 << 23)
    bits = bits_of(x + float_of(power))
    return bits + (bits >> 20) - ((127 - 6 + 20) << 3)


@triton.jit
def fp8_code(n, table):
    return (_e4m3(n) & 0x7F) | (bits_of(n) >> 24 & 0x80)


fp8_unsigned_value = fp8_value


@triton.jit
def fp8_unsigned_code(n, table):
    n = tl.maximum(n, 0.0)
    return _at_least_one((_e4m3(n) & 0x7F).to(tl.int32), n)


@triton.jit
def int4_value(code, table):
    # Three straight lines whose roundings meet the map's fp32 entries, contracted or not, and 1 at the end.
    m = _float(code, -7.0)
    high = (tl.abs(m) - 5.0) * 0.22499999403953552 + 0.4375
    middle = tl.abs(m) * 0.04500000178813934 - 0.05750000476837158
    magnitude = tl.minimum(tl.maximum(tl.maximum(high, middle), tl.abs(m) * 0.0055), 1.0)
    return float_of(bits_of(magnitude) | (bits_of(m) & 0x80000000))


@triton.jit
def int4_code(n, table):
    """How many middles are below ``n``: that of the magnitude, ties going away from zero for ``n < 0``."""
    M: tl.constexpr = FOUR_BIT_MIDDLES
    bits = n.to(tl.int32, bitcast=True)
    t = (bits & 0x7FFFFFFF) + (bits >> 31 & 1)
    upper = t > M[3]
    middle = t > tl.where(upper, M[5], M[1])
    low = tl.where(middle, M[2], M[0])
    lower = t > tl.where(upper, tl.where(middle, M[6], M[4]), low)
    m = tl.where(upper, 4, 0) + tl.where(middle, 2, 0) + tl.where(lower, 1, 0) + tl.where(t > M[7], 1, 0)
    return 7 + tl.where(bits < 0, tl.maximum(-m, -7), m)


@triton.jit
def int4_unsigned_value(code, table):
    # The spacing of fp32 numbers at 2**19 is a sixteenth.
    k = float_of(code | 0x49000000) - (2.0**19 - 0.0625)
    return times(times(k, k), times(k, k))


@triton.jit
def int4_unsigned_code(n, table):
    # Up to 2**-14 the code is 0: a second moment that is not zero never becomes zero.
    return rounded(times(root(root(tl.maximum(n, 2.0**-14))), 16.0)) - 1
