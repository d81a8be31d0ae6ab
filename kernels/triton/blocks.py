"""What all block codecs share: a code of 8 or 4 bits for each value, a scale for each block of neighbours.

A codec is two functions in units of its scale, ``value(code, table)`` and ``code(n, table)``, and how its
planes look. ``CODEC`` is ``(decode, encode, addresses, value, code, BLOCK, PER, BITS, SIGNED)`` with ``PER``
codes a byte, the ``BITS`` of a scale, and whether a scale carries the sign of its block's largest
magnitude.
"""

import triton
import triton.language as tl

from .arithmetic import bits_of, float_of, reciprocal, times
from .tile import offsets, read, write

INFINITY = tl.constexpr(0x7F800000)
QUIET_NAN = tl.constexpr(0x7FC00000)
SMALLEST_NORMAL = tl.constexpr(0x00800000)


@triton.constexpr_function
def _shape(size, block, vector, warps):
    """Elements as [groups, rows of a block, warps, blocks of a row, part of a block in a row]."""
    row = 32 * vector
    part = min(block, row)
    return [size * part // (row * warps * block), block // part, warps, row // part, part]


@triton.constexpr_function
def _integer(bits):
    return {16: tl.uint16, 32: tl.uint32}[bits]


@triton.jit
def _largest(x, BLOCK: tl.constexpr, SPREAD: tl.constexpr):
    """Each block's largest integer: first of what a thread has, then of what a warp has."""
    return tl.max(tl.max(x.reshape(_shape(x.shape[0], BLOCK, SPREAD[0], SPREAD[1])), 1), 3)


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
def _pairs(SIZE: tl.constexpr, SPREAD: tl.constexpr):
    """Offsets of the bytes that hold two codes each."""
    return offsets(SIZE // 2, 16 * SPREAD[0], SPREAD[1])


@triton.jit
def _scale_bits(x, CODEC: tl.constexpr, SPREAD: tl.constexpr):
    """Each block's scale as the bits of an fp32 number: NaN if there is one, 0 for denormals."""
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    if CODEC[8]:
        # Both signs may reach the maximum; the positive one wins.
        key = _largest((magnitude << 1) | (bits >> 31 ^ 1), CODEC[5], SPREAD)
        top, sign = key >> 1, (key & 1 ^ 1) << 31
    else:
        top = _largest(magnitude.to(tl.int32), CODEC[5], SPREAD).to(tl.uint32)
        sign = tl.zeros_like(top)
    if CODEC[7] == 16:
        top = tl.where(top > INFINITY, QUIET_NAN, top).to(tl.uint32)
        top = tl.where(top < SMALLEST_NORMAL, 0, top + 0x7FFF + (top >> 16 & 1)) & 0xFFFF0000
    else:
        top = tl.where(top < SMALLEST_NORMAL, 0, top)
    return top.to(tl.uint32) | sign


@triton.jit
def _normalised(x, scale_bits, CODEC: tl.constexpr, SPREAD: tl.constexpr):
    """Values divided by their block's scale; 0 where it is zero or not finite."""
    # In one comparison: no denormals are left, and below 0 it wraps.
    alive = (scale_bits & 0x7FFFFFFF) - SMALLEST_NORMAL < INFINITY - SMALLEST_NORMAL
    inverse = reciprocal(float_of(scale_bits))
    SIZE: tl.constexpr = x.shape[0]
    n = times(x, _for_each(inverse, SIZE, CODEC[5], SPREAD[0], SPREAD[1]))
    return tl.where(_for_each(alive, SIZE, CODEC[5], SPREAD[0], SPREAD[1]), n, 0.0)


@triton.jit
def _write_codes(code, plane, dense, CODEC: tl.constexpr, SPREAD: tl.constexpr):
    if CODEC[6] == 2:
        SIZE: tl.constexpr = code.shape[0]
        if dense[2] is not None:
            code = tl.where(dense[2], code, 0)
        even, odd = tl.split(code.to(tl.uint8).reshape(SIZE // 2, 2))
        offs = _pairs(SIZE, SPREAD)
        pair = even | (odd << 4)
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
        code = tl.join(pair & 15, pair >> 4).reshape(SIZE)
    else:
        code = read(planes[0], tl.uint8, dense, SPREAD[0])
    value = CODEC[3](code.to(tl.uint32), planes[-1])
    return times(value, _read_scales(planes[1], dense, SIZE, CODEC, SPREAD))


@triton.jit
def block_encode(x, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    dense = home[1]
    if dense[2] is not None:
        x = tl.where(dense[2], x, 0.0)
    bits = _scale_bits(x, CODEC, SPREAD)
    _write_scales(bits, planes[1], dense, x.shape[0], CODEC, SPREAD)
    code = CODEC[4](_normalised(x, bits, CODEC, SPREAD), planes[-1])
    _write_codes(code, planes[0], dense, CODEC, SPREAD)
