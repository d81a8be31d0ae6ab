"""What all block codecs share: a code of 8 or 4 bits for each value, a scale for each block of neighbours.

A codec is two functions in units of its scale, ``value(code, table)`` and ``code(n, table)``, and how its
planes look. ``CODEC`` is ``(decode, encode, addresses, value, code, BLOCK, PER, BITS, SIGNED, TAKES_NAN)``
with ``PER`` codes a byte, the ``BITS`` of a scale, whether a scale carries the sign of its block's largest
magnitude, and whether the code of NaN is that of 0.
"""

import triton
import triton.language as tl

from .arithmetic import INTERPRETED, PROPAGATE, bits_of, float_of, reciprocal, times
from .codecs import to_bf16
from .tile import offsets, read, write

INFINITY = tl.constexpr(0x7F800000)
SMALLEST_NORMAL = tl.constexpr(0x00800000)

# A product that is denormal is zero.
LONG_SCALE = tl.constexpr("mul.rn.ftz.f32 $0, $1, 0f3F800000;")
SHORT_SCALE = tl.constexpr(
    "{ .reg .b32 x; mul.rn.ftz.f32 x, $1, 0f3F800000; cvt.rn.bf16x2.f32 $0, x, 0f00000000; }"
)


@triton.constexpr_function
def _shape(size, block, vector, warps):
    """Elements as [groups, rows of a block, warps, blocks of a row, part of a block in a row]."""
    row = 32 * vector
    part = min(block, row)
    return [size * part // (row * warps * block), block // part, warps, row // part, part]


@triton.constexpr_function
def _integer(bits):
    return {16: tl.uint16, 32: tl.uint32}[bits]


@triton.constexpr_function
def _parts(size, block, vector, warps):
    """The same with a part as [threads, neighbours of a thread]."""
    *outer, part = _shape(size, block, vector, warps)
    return [*outer, part // vector, vector]


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=PROPAGATE)


@triton.jit
def _top(x, AXIS: tl.constexpr):
    """The largest of magnitudes, NaN if there is one."""
    if INTERPRETED:
        return tl.max(bits_of(x).to(tl.int32), AXIS).to(tl.float32, bitcast=True)
    else:
        # One instruction each, as that of floats takes magnitudes itself; that of integers does not.
        return tl.reduce(x, AXIS, _larger)


@triton.jit
def _largest(x, CODEC: tl.constexpr, SPREAD: tl.constexpr):
    """The bits of each block's largest magnitude and its sign, first of what a thread has, then of a warp."""
    x = x.reshape(_parts(x.shape[0], CODEC[5], SPREAD[0], SPREAD[1]))
    if CODEC[8]:
        # As integers with a sign positive numbers are the largest, as those without negative ones.
        bits = bits_of(x)
        positive = tl.max(tl.max(bits.to(tl.int32, bitcast=True), 5), 1)
        negative = tl.max(tl.max(bits, 5), 1)
        # Both signs may reach the maximum; the positive one wins.
        key = tl.where(positive >= 0, positive.to(tl.uint32, bitcast=True) << 1 | 1, 0)
        key = tl.max(tl.maximum(key, negative << 1), 3)
        return key >> 1, (key & 1 ^ 1) << 31
    else:
        top = tl.max(_top(_top(tl.abs(x), 5), 1).to(tl.int32, bitcast=True), 3).to(tl.uint32)
        return top, tl.zeros_like(top)


@triton.jit
def _for_each(x, SIZE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, WARPS: tl.constexpr):
    """A block's value for each of its elements."""
    return tl.broadcast_to(x[:, None, :, :, None], _shape(SIZE, BLOCK, VECTOR, WARPS)).reshape(SIZE)


@triton.jit
def _read_scales(plane, dense, SIZE: tl.constexpr, CODEC: tl.constexpr, SPREAD: tl.constexpr):
    """The scale of each element."""
    BLOCK: tl.constexpr = CODEC[5]
    SHAPE: tl.constexpr = _shape(SIZE, BLOCK, SPREAD[0], SPREAD[1])
    group, warp = tl.arange(0, SHAPE[0])[:, None, None], tl.arange(0, SHAPE[2])[None, :, None]
    block = group * SHAPE[3] + warp * (SIZE // SHAPE[2] // BLOCK) + tl.arange(0, SHAPE[3])[None, None, :]
    pointers = plane.to(tl.pointer_type(_integer(CODEC[7]))) + dense[0] // BLOCK + block
    bits = tl.load(pointers, mask=None if dense[3] is None else block * BLOCK < dense[3])
    return _for_each(float_of(bits.to(tl.uint32) << (32 - CODEC[7])), SIZE, BLOCK, SPREAD[0], SPREAD[1])


@triton.jit
def _write_scales(bits, plane, dense, SIZE: tl.constexpr, CODEC: tl.constexpr, SPREAD: tl.constexpr):
    """The thread that has a block's first elements writes: the layout is that of the values as they are."""
    VECTOR: tl.constexpr = SPREAD[0]
    BLOCK: tl.constexpr = CODEC[5]
    first = VECTOR * offsets(SIZE // VECTOR, 32, SPREAD[1])
    mask = first % BLOCK == 0
    if dense[3] is not None:
        mask &= first < dense[3]
    bits = _for_each(bits >> (32 - CODEC[7]), SIZE // VECTOR, BLOCK // VECTOR, 1, SPREAD[1])
    pointers = plane.to(tl.pointer_type(_integer(CODEC[7]))) + dense[0] // BLOCK + first // BLOCK
    tl.store(pointers, bits.to(_integer(CODEC[7])), mask=mask)


@triton.jit
def _nibbles(pair):
    """The lower and the upper half of bytes."""
    if INTERPRETED:
        return pair & 15, pair >> 4
    else:
        # Of four bytes at a time.
        return tl.inline_asm_elementwise(
            "and.b32 $0, $2, 0x0F0F0F0F; shr.b32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;",
            "=&r,=r,r", [pair], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _pairs(SIZE: tl.constexpr, SPREAD: tl.constexpr):
    """Offsets of the bytes that hold two codes each."""
    return offsets(SIZE // 2, 16 * SPREAD[0], SPREAD[1])


@triton.jit
def _scale_bits(x, CODEC: tl.constexpr, SPREAD: tl.constexpr):
    """Each block's scale as the bits of an fp32 number: NaN if there is one, 0 for denormals."""
    top, sign = _largest(x, CODEC, SPREAD)
    # Denormals are zero before they are rounded up to a normal number.
    if INTERPRETED:
        top = tl.where(top < SMALLEST_NORMAL, 0, top).to(tl.uint32)
        if CODEC[7] == 16:
            top = to_bf16(float_of(top)).to(tl.uint32) << 16
    else:
        ASM: tl.constexpr = SHORT_SCALE if CODEC[7] == 16 else LONG_SCALE
        top = tl.inline_asm_elementwise(ASM, "=r,r", [top], dtype=tl.uint32, is_pure=True, pack=1)
    return top | sign


@triton.jit
def _normalised(x, scale_bits, CODEC: tl.constexpr, SPREAD: tl.constexpr):
    """Values divided by their block's scale, and whether that is finite and not 0; else they are 0 or NaN."""
    # In one comparison: no denormals are left, and below 0 it wraps.
    magnitude = scale_bits & 0x7FFFFFFF if CODEC[8] else scale_bits
    alive = magnitude - SMALLEST_NORMAL < INFINITY - SMALLEST_NORMAL
    inverse = tl.where(alive, reciprocal(float_of(scale_bits)), 0.0)
    SIZE: tl.constexpr = x.shape[0]
    alive = _for_each(alive, SIZE, CODEC[5], SPREAD[0], SPREAD[1])
    return times(x, _for_each(inverse, SIZE, CODEC[5], SPREAD[0], SPREAD[1])), alive


@triton.jit
def _write_codes(code, plane, dense, CODEC: tl.constexpr, SPREAD: tl.constexpr):
    if CODEC[6] == 2:
        SIZE: tl.constexpr = code.shape[0]
        if dense[2] is not None:
            code = tl.where(dense[2], code, 0)
        even, odd = tl.split(code.reshape(SIZE // 2, 2))
        offs = _pairs(SIZE, SPREAD)
        pair = (even | odd << 4).to(tl.uint8)
        if dense[3] is None:
            write(plane, tl.uint8, (dense[0] // 2, offs, None), pair, SPREAD[0] // 2)
        else:
            write(plane, tl.uint8, (dense[0] // 2, offs, 2 * offs < dense[3]), pair, SPREAD[0] // 2)
    else:
        write(plane, tl.uint8, dense, code.to(tl.uint8), SPREAD[0])


@triton.jit
def block_decode(planes, home, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    dense = home[1]
    SIZE: tl.constexpr = dense[1].shape[0]
    if CODEC[6] == 2:
        offs = _pairs(SIZE, SPREAD)
        if dense[3] is None:
            pair = read(planes[0], tl.uint8, (dense[0] // 2, offs, None), SPREAD[0] // 2)
        else:
            pair = read(planes[0], tl.uint8, (dense[0] // 2, offs, 2 * offs < dense[3]), SPREAD[0] // 2)
        low, high = _nibbles(pair)
        value = tl.join(CODEC[3](low, planes[-1]), CODEC[3](high, planes[-1])).reshape(SIZE)
    else:
        value = CODEC[3](read(planes[0], tl.uint8, dense, SPREAD[0]), planes[-1])
    return times(value, _read_scales(planes[1], dense, SIZE, CODEC, SPREAD))


@triton.jit
def block_encode(x, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    dense = home[1]
    if dense[2] is not None:
        x = tl.where(dense[2], x, 0.0)
    bits = _scale_bits(x, CODEC, SPREAD)
    _write_scales(bits, planes[1], dense, x.shape[0], CODEC, SPREAD)
    n, alive = _normalised(x, bits, CODEC, SPREAD)
    if INTERPRETED or (CODEC[6] == 2 and not CODEC[9]):
        n = tl.where(alive, n, 0.0)
    code = CODEC[4](n, planes[-1])
    if CODEC[6] == 1 and not (CODEC[9] or INTERPRETED):
        # The code of 0 is 0 here, for four values at once.
        code = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r,r,r,r", [code.to(tl.uint8), tl.where(alive, -1, 0)],
            dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    _write_codes(code, planes[0], dense, CODEC, SPREAD)
