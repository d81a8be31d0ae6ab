"""The codecs: planes in memory to fp32 values in registers and back.

``<name>_decode(planes, place, VECTOR)`` and ``<name>_encode(x, planes, place, VECTOR)`` are found by the
codec's name in the catalogue. ``planes`` are addresses; ``place`` is ``(start, offs, mask)``: elements
``start + offs`` where ``mask`` holds, all of them if it is None.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def address(plane, DTYPE: tl.constexpr, place, VECTOR: tl.constexpr):
    """Pointers to elements ``start + offs``; ``VECTOR`` elements of a plane are aligned and go together."""
    pointer = plane.to(tl.pointer_type(DTYPE))
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, VECTOR * (DTYPE.primitive_bitwidth // 8))
    return pointer + place[0] + place[1]


@triton.jit
def read(plane, DTYPE: tl.constexpr, place, VECTOR: tl.constexpr):
    return tl.load(address(plane, DTYPE, place, VECTOR), mask=place[2])


@triton.jit
def write(plane, DTYPE: tl.constexpr, place, x, VECTOR: tl.constexpr):
    tl.store(address(plane, DTYPE, place, VECTOR), x, mask=place[2])


@triton.jit
def fp32_decode(planes, place, VECTOR: tl.constexpr):
    return read(planes[0], tl.float32, place, VECTOR)


@triton.jit
def fp32_encode(x, planes, place, VECTOR: tl.constexpr):
    write(planes[0], tl.float32, place, x, VECTOR)


@triton.jit
def fp16_decode(planes, place, VECTOR: tl.constexpr):
    return read(planes[0], tl.float16, place, VECTOR).to(tl.float32)


@triton.jit
def fp16_encode(x, planes, place, VECTOR: tl.constexpr):
    write(planes[0], tl.float16, place, x.to(tl.float16), VECTOR)


@triton.jit
def bf16_decode(planes, place, VECTOR: tl.constexpr):
    # The interpreter's own conversion loses denormals.
    return (read(planes[0], tl.uint16, place, VECTOR).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def bf16_encode(x, planes, place, VECTOR: tl.constexpr):
    # The interpreter's cast truncates; on a GPU the cast is one instruction for two values.
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        half = tl.where(x == x, bits, 0x7FFF).to(tl.uint16)
    else:
        half = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    write(planes[0], tl.uint16, place, half, VECTOR)
