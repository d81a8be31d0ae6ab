"""The codecs whose values stand for themselves: planes in memory to fp32 values in registers and back.

``<name>_decode(planes, home, SPREAD, CODEC)`` and ``<name>_encode(x, planes, home, stream, SPREAD, CODEC)``
are found by the codec's name in the catalogue; those of block codecs, ``<name>_value`` and ``<name>_code``,
are in block_codecs.py. ``planes`` are addresses; tile.py says what a home is, philox.py what a stream.
"""

import triton
import triton.language as tl

from .arithmetic import INTERPRETED, bits_of, float_of, minus
from .philox import random_16_bits
from .tile import read, write

QUIET_NAN = tl.constexpr(0x7FC00000)

# To each of four upper halves 256 times a signed byte: dp2a adds products of two halves with two bytes.
JOIN_24_BITS = tl.constexpr(
    "{ .reg .b32 a, b, c, d; shl.b32 a, $4, 16; and.b32 b, $4, 0xFFFF0000; "
    "shl.b32 c, $5, 16; and.b32 d, $5, 0xFFFF0000; "
    "dp2a.lo.s32.s32 $0, 0x100, $6, a; dp2a.lo.s32.s32 $1, 0x1000000, $6, b; "
    "dp2a.hi.s32.s32 $2, 0x100, $6, c; dp2a.hi.s32.s32 $3, 0x1000000, $6, d; }"
)
# The other way. One dp4a adds half a unit of either part, 0x807F = 0xFF * 0x81, and the last bit that stays;
# the byte's upper bit is then wrong, because it has taken the half that was meant for the upper part.
SPLIT_24_BITS = tl.constexpr(
    "{ .reg .b32 x<4>, y; "
    + "".join(
        f"min.s32 x{i}, ${3 + i}, 0x7FC00000; lop3.b32 y, x{i}, 0x100, 0xFF, 0xEA; "
        f"dp4a.u32.u32 x{i}, y, 0x181, x{i}; "
        for i in range(4)
    )
    + "prmt.b32 $0, x0, x1, 0x7632; prmt.b32 $1, x2, x3, 0x7632; "
    "prmt.b32 x0, x0, x1, 0x0051; prmt.b32 x2, x2, x3, 0x0051; prmt.b32 x0, x0, x2, 0x5410; "
    "xor.b32 $2, x0, 0x80808080; }"
)


@triton.jit
def _canonical(x):
    """The bits of fp32 values, all NaNs made one whose lower half is zero, as that of Inf."""
    if INTERPRETED:
        return tl.where(x == x, bits_of(x), QUIET_NAN).to(tl.uint32)
    else:
        # A GPU's arithmetic has one NaN, whose bits are the largest signed number.
        return tl.minimum(x.to(tl.int32, bitcast=True), QUIET_NAN).to(tl.uint32, bitcast=True)


@triton.jit
def fp32_decode(planes, home, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    return read(planes[0], tl.float32, home[0], SPREAD[0])


@triton.jit
def fp32_encode(x, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    write(planes[0], tl.float32, home[0], x, SPREAD[0])


@triton.jit
def blank_decode(planes, home, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    return tl.zeros_like(home[0][1]).to(tl.float32)


blank_encode = fp32_encode


@triton.jit
def fp16_decode(planes, home, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    return read(planes[0], tl.float16, home[0], SPREAD[0]).to(tl.float32)


@triton.jit
def fp16_encode(x, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    write(planes[0], tl.float16, home[0], x.to(tl.float16), SPREAD[0])


@triton.jit
def fp16_kahan_decode(planes, home, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    p = read(planes[0], tl.float16, home[0], SPREAD[0])
    return p.to(tl.float32) + read(planes[1], tl.float16, home[1], SPREAD[0]).to(tl.float32)


@triton.jit
def fp16_kahan_encode(x, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    p = x.to(tl.float16)
    kept = p.to(tl.float32)
    lost = tl.where(tl.abs(kept) < float("inf"), minus(x, kept), 0.0)
    write(planes[0], tl.float16, home[0], p, SPREAD[0])
    write(planes[1], tl.float16, home[1], lost.to(tl.float16), SPREAD[0])


@triton.jit
def from_bf16(half):
    # The interpreter's own conversion loses denormals.
    if INTERPRETED:
        return float_of(half.to(tl.uint32) << 16)
    else:
        # One instruction each; the compiler takes two for every other one.
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
            "=&r,=r,r", [half], dtype=tl.uint32, is_pure=True, pack=2,
        )  # fmt: skip
        return float_of(bits)


@triton.jit
def to_bf16(x):
    # The interpreter's cast truncates; on a GPU the cast is one instruction for two values.
    if INTERPRETED:
        bits = bits_of(x)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FFF).to(tl.uint16)
    else:
        return x.to(tl.bfloat16).to(tl.uint16, bitcast=True)


@triton.jit
def bf16_decode(planes, home, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    return from_bf16(read(planes[0], tl.uint16, home[0], SPREAD[0]))


@triton.jit
def bf16_encode(x, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    write(planes[0], tl.uint16, home[0], to_bf16(x), SPREAD[0])


@triton.jit
def bf16_kahan_decode(planes, home, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    p = read(planes[0], tl.uint16, home[0], SPREAD[0])
    return from_bf16(p) + from_bf16(read(planes[1], tl.uint16, home[1], SPREAD[0]))


@triton.jit
def bf16_kahan_encode(x, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    p = to_bf16(x)
    kept = from_bf16(p)
    lost = tl.where(tl.abs(kept) < float("inf"), minus(x, kept), 0.0)
    write(planes[0], tl.uint16, home[0], p, SPREAD[0])
    write(planes[1], tl.uint16, home[1], to_bf16(lost), SPREAD[0])


bf16_sr_decode = bf16_decode


@triton.jit
def bf16_sr_encode(x, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    bits = _canonical(x) + random_16_bits(home[1], stream, SPREAD)
    write(planes[0], tl.uint16, home[0], (bits >> 16).to(tl.uint16), SPREAD[0])


@triton.jit
def bf16_split16_decode(planes, home, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    high = bits_of(from_bf16(read(planes[0], tl.uint16, home[0], SPREAD[0])))
    low = read(planes[1], tl.int16, home[1], SPREAD[0]).to(tl.int32)
    return float_of(high + low.to(tl.uint32))


@triton.jit
def bf16_split16_encode(x, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    bits = _canonical(x)
    write(planes[0], tl.uint16, home[0], ((bits + 0x8000) >> 16).to(tl.uint16), SPREAD[0])
    write(planes[1], tl.uint16, home[1], bits.to(tl.uint16), SPREAD[0])


@triton.jit
def bf16_split8_decode(planes, home, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    high = read(planes[0], tl.uint16, home[0], SPREAD[0])
    low = read(planes[1], tl.uint8, home[1], SPREAD[0])
    if INTERPRETED:
        low = low.to(tl.int8, bitcast=True).to(tl.int32) << 8
        return float_of(bits_of(from_bf16(high)) + low.to(tl.uint32))
    else:
        return tl.inline_asm_elementwise(
            JOIN_24_BITS, "=&f,=&f,=&f,=&f,r,r,r", [high, low], dtype=tl.float32, is_pure=True, pack=4
        )


@triton.jit
def bf16_split8_encode(x, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    if INTERPRETED:
        bits = _canonical(x)
        bits += 0x7F + (bits >> 8 & 1)
        high, low = ((bits + 0x8000) >> 16).to(tl.uint16), (bits >> 8).to(tl.uint8)
    else:
        high, low = tl.inline_asm_elementwise(
            SPLIT_24_BITS, "=&r,=&r,=&r,r,r,r,r", [x], dtype=(tl.uint16, tl.uint8), is_pure=True, pack=4
        )
    write(planes[0], tl.uint16, home[0], high, SPREAD[0])
    write(planes[1], tl.uint8, home[1], low, SPREAD[0])
