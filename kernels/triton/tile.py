"""Which elements of a tile a thread has, and how values of planes in memory get there and back.

A place is ``(start, offs, mask)``: elements ``start + offs`` where ``mask`` holds, all of them if it is
None; a dense one has a fourth part: how many elements there are, None if the mask is. A home is where a
codec's values live: the place in its first plane, and the (dense) one in its others. ``SPREAD`` is
``(VECTOR, WARPS)``: a thread has ``VECTOR`` neighbours at a time, which are aligned.
"""

import triton
import triton.language as tl


@triton.jit
def offsets(SIZE: tl.constexpr, ROW: tl.constexpr, WARPS: tl.constexpr):
    """A warp takes ``ROW`` neighbours at a time, and all its rows are neighbours.

    So blocks of up to ``SIZE // WARPS`` elements stay within a warp: their maximum needs no shared memory.
    """
    i = tl.arange(0, SIZE)
    return i % ROW + (i // ROW % WARPS) * (SIZE // WARPS) + i // (ROW * WARPS) * ROW


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
