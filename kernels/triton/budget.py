"""Launch shapes and the default arithmetic: pure functions of the storage, free of torch and triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..spec import Codec, Rule, bytes_moved

LANE_INSTRUCTIONS_PER_BYTE = 6.9
"""What an H200 issues (132 SMs x 4 x 32 lanes x 1.75 GHz) while it copies one byte at 4.3 TB/s."""

USABLE_SHARE = 0.6
"""Of the issue slots: loads stall, and never all slots are used."""

EXACT_INSTRUCTIONS = {
    **{"sgd": 12, "sgd_momentum": 18, "lion": 22},
    **{"adam": 45, "adam_amsgrad": 48, "cast_adam": 50},
}
"""Executed per element in exact arithmetic, rounded up from the dearest storage of ``bench static``."""

MASK_INSTRUCTIONS = {0: 14, 2: 21, 4: 25, 8: 36, 16: 58}
"""The same for a mask, beyond its rule, by the size of its groups."""

CODEC_INSTRUCTIONS = {
    **{"bf16_sr": 11, "bf16_kahan": 9, "fp16_kahan": 8, "bf16_split8": 12, "bf16_split16": 6},
    **{"int8": 18, "int8_unsigned": 17, "int8_companded": 28, "int8_companded_unsigned": 25},
    **{"fp8": 11, "fp8_unsigned": 13, "int4": 45, "int4_unsigned": 28},
}
"""The same for decoding and encoding, beyond fp32; the rules' own figures include bf16 and fp16."""


class Shape(NamedTuple):
    """Elements per program, per masked chunk and per aligned access; warps per program."""

    tile: int
    chunk: int
    vector: int
    warps: int


def launch_shape(codecs: Sequence[Codec]) -> Shape:
    """The shape for kernels that touch planes of these codecs.

    The widest plane is read 16 bytes at a time. Narrower ones follow with as many elements: a wider
    access would have to be redistributed through shared memory (a barrier per plane, 16 more registers).
    """
    widest = max(plane.bits // plane.per for c in codecs for plane in c.planes if plane.per < max(c.block, 2))
    narrow = sum(codec.bytes_per_value for codec in codecs) <= 2
    # A block stays within a warp: in a chunk each of four warps has a quarter.
    chunk = max(512, *(4 * codec.block for codec in codecs))
    return Shape(4096 if narrow else 2048, chunk, 128 // widest, warps=4)


TILES_OF_A_PROGRAM = 8
"""At most, where so many programs are left that the last ones to end do not matter."""

MANY_PROGRAMS = 8192
"""Several times what 132 multiprocessors hold at once."""


def span(elements: int, tile: int) -> int:
    """How many elements a program works on, for a launch of so many."""
    tiles = elements // (tile * MANY_PROGRAMS)
    return tile * min(TILES_OF_A_PROGRAM, 1 << max(0, tiles.bit_length() - 1))


def auto_exact(rule: Rule, param: Codec, grad: Codec, states: tuple[Codec, ...]) -> bool:
    """Whether exact arithmetic fits into the time that memory takes: what ``arithmetic="auto"`` means.

    A rule that nobody has counted yet is taken to cost as much as the dearest.
    """
    inner = rule.inner or rule
    instructions = EXACT_INSTRUCTIONS.get(inner.name, max(EXACT_INSTRUCTIONS.values()))
    instructions += 0 if inner is rule else MASK_INSTRUCTIONS[rule.group]
    instructions += sum(CODEC_INSTRUCTIONS.get(codec.name, 0) for codec in (param, *states))
    budget = LANE_INSTRUCTIONS_PER_BYTE * sum(bytes_moved(rule, param, grad, states))
    return instructions <= USABLE_SHARE * budget
