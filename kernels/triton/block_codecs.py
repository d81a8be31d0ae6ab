"""The codecs of 8 and 4 bits: ``<name>_value(code, table)`` and ``<name>_code(n, table)``.

Both are in units of the block's scale, codes are uint32 or int32, ``table`` is the address of the codec's
lookup table if it has one. Magnitudes of ``n`` exceed 1 by no more than the rounding of a scale. Functions of
``<name>_sm89`` do the same with instructions that GPUs have from capability 8.9 on.
"""

import numpy as np
import triton
import triton.language as tl

from ..lookup import SIGNED_FOUR_BITS
from ..lookup import STEPS as _STEPS
from .arithmetic import INTERPRETED, bits_of, float_of, magnitude, quotient, root, rounded, times

_MAGNITUDES = np.array(SIGNED_FOUR_BITS, np.float32)[7:]
_MIDDLES = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / np.float32(2)
FOUR_BIT_MIDDLES = tl.constexpr(tuple(map(int, _MIDDLES.view(np.int32))))
STEPS = tl.constexpr(_STEPS)
ONE_448TH = tl.constexpr(float(np.float32(1 / 448)))
ONE_65025TH = tl.constexpr(float(np.float32(1 / 65025)))


def _asm(steps):
    """PTX that makes four words of four bytes."""
    return tl.constexpr("{ .reg .b32 x; " + " ".join(steps.format(i=i) for i in range(4)) + " }")


# prmt takes bytes by number: 0 to 3 of the first operand, 4 to 7 of the second.
FLOATS = _asm("prmt.b32 ${i}, $4, 0x4B000000, 0x744{i};")
SIGNED_FLOATS = _asm("xor.b32 x, $4, 0x80808080; prmt.b32 ${i}, x, 0x4B000000, 0x744{i};")
SIXTEENTHS = _asm("prmt.b32 ${i}, $4, 0x49000000, 0x744{i};")

# Four times a byte: where its float is in a table.
PLACES = tl.constexpr(
    "{ .reg .b32 x; shl.b32 x, $4, 2; and.b32 $0, x, 0x3FC; shr.u32 x, $4, 6; and.b32 $1, x, 0x3FC; "
    "shr.u32 x, $4, 14; and.b32 $2, x, 0x3FC; shr.u32 x, $4, 22; and.b32 $3, x, 0x3FC; }"
)

# Those whose code of NaN is that of 0.
TAKE_NAN = ("int8", "int8_unsigned", "int8_companded_unsigned", "fp8_unsigned", "int4_unsigned")


@triton.jit
def _words(code, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=&r,=&r,=&r,=&r,r", [code], dtype=tl.uint32, is_pure=True, pack=4)


@triton.jit
def _float(code, OFFSET: tl.constexpr):
    """``code + OFFSET`` exactly; one instruction for the bits and one for the sum."""
    bits = code.to(tl.uint32) | 0x4B000000 if INTERPRETED else _words(code, FLOATS)
    return float_of(bits) + (OFFSET - 8388608.0)


@triton.jit
def _signed_float(code):
    """The same of a code with a sign."""
    bits = (code.to(tl.uint32) ^ 0x80) | 0x4B000000 if INTERPRETED else _words(code, SIGNED_FLOATS)
    return float_of(bits) - (8388608.0 + 128.0)


@triton.jit
def _at_least_one(code, n):
    """A second moment that is not zero never becomes zero: dividing by it would blow the step up.

    ``code`` is a float yet, and 0 takes the place of NaN.
    """
    return tl.maximum(code, tl.where(n > 0, 1.0, 0.0))


@triton.jit
def _step(n, table):
    """Sign and, 8 bits above its middle, the code of a dynamic map: a sum with what the upper bits tell."""
    bits = bits_of(n)
    return tl.load((table + STEPS).to(tl.pointer_type(tl.uint32)) + (bits >> 16)) + bits


@triton.jit
def int8_value(code, table):
    place = code.to(tl.uint32) * 4 if INTERPRETED else _words(code, PLACES)
    return tl.load((table + place).to(tl.pointer_type(tl.float32)))


@triton.jit
def int8_code(n, table):
    step = _step(n, table)
    if INTERPRETED:
        return (step >> 16 ^ (step.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True)).to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 x, y, s;
            prmt.b32 x, $1, $2, 0x0062; prmt.b32 y, $3, $4, 0x0062; prmt.b32 x, x, y, 0x5410;
            prmt.b32 y, $1, $2, 0x00FB; prmt.b32 s, $3, $4, 0x00FB; prmt.b32 y, y, s, 0x5410;
            xor.b32 $0, x, y; }""",
            "=r,r,r,r,r", [step], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip


int8_unsigned_value = int8_value


@triton.jit
def int8_unsigned_code(n, table):
    return _step(n, table) >> 16


@triton.jit
def int8_companded_value(code, table):
    q = _signed_float(code)
    return quotient(q, 254.0 - tl.abs(q))


@triton.jit
def int8_companded_code(n, table):
    return rounded(quotient(times(n, 254.0), magnitude(n) + 1.0))


@triton.jit
def int8_companded_unsigned_value(code, table):
    q = _float(code, 0.0)
    return times(times(q, q), ONE_65025TH)


@triton.jit
def int8_companded_unsigned_code(n, table):
    # The root of what is below 2**-126 is NaN there, and 0 here.
    return rounded(_at_least_one(times(root(n), 255.0), n))


@triton.jit
def fp8_value(code, table):
    code = code.to(tl.uint32)
    # Exponent and mantissa where fp32 has them are the value times 2**-120, a denormal sometimes.
    bits = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
    return times(float_of(bits), ONE_448TH * 2.0**120)


@triton.jit
def _e4m3(n):
    """The magnitude's code: adding 2**20 times its power of two leaves 3 bits of mantissa."""
    x = tl.minimum(times(magnitude(n), 448.0), 448.0)
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
    code = (_e4m3(n) & 0x7F).to(tl.int32)
    return tl.maximum(code, tl.minimum(n.to(tl.int32, bitcast=True), 1))


@triton.jit
def fp8_sm89_value(code, table):
    x = tl.inline_asm_elementwise(
        """{ .reg .b16 a, b, c, d; .reg .b32 x, y;
        mov.b32 {a, b}, $4;
        cvt.rn.f16x2.e4m3x2 x, a; mov.b32 {a, c}, x; cvt.f32.f16 $0, a; cvt.f32.f16 $1, c;
        cvt.rn.f16x2.e4m3x2 y, b; mov.b32 {b, d}, y; cvt.f32.f16 $2, b; cvt.f32.f16 $3, d; }""",
        "=&f,=&f,=&f,=&f,r", [code], dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip
    return times(x, ONE_448TH)


@triton.jit
def _e4m3_sm89(x):
    return tl.inline_asm_elementwise(
        """{ .reg .b16 a, b;
        cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;
        mov.b32 $0, {a, b}; }""",
        "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def fp8_sm89_code(n, table):
    return _e4m3_sm89(times(n, 448.0))


fp8_unsigned_sm89_value = fp8_sm89_value


@triton.jit
def fp8_unsigned_sm89_code(n, table):
    return _e4m3_sm89(tl.maximum(times(n, 448.0), tl.where(n > 0, 2.0**-9, 0.0)))


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
    bits = code.to(tl.uint32) | 0x49000000 if INTERPRETED else _words(code, SIXTEENTHS)
    k = float_of(bits) - (2.0**19 - 0.0625)
    return times(times(k, k), times(k, k))


@triton.jit
def int4_unsigned_code(n, table):
    # Up to 2**-14 the code is 0: a second moment that is not zero never becomes zero.
    return rounded(times(root(root(tl.maximum(n, 2.0**-14))), 16.0)) - 1
