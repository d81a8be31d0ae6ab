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
    **{"sgd": 15, "sgd_momentum": 24, "lion": 27},
    **{"adam": 55, "adam_amsgrad": 59, "cast_adam": 60},
}
"""Executed per element in exact arithmetic, rounded up from the dearest storage of ``bench static``."""

MASK_INSTRUCTIONS = {0: 14, 2: 21, 4: 25, 8: 36, 16: 58}
"""The same for a mask, beyond its rule, by the size of its groups."""

CODEC_INSTRUCTIONS = {
    **{"bf16_sr": 19, "bf16_kahan": 13, "fp16_kahan": 11, "bf16_split8": 18, "bf16_split16": 9},
    **{"int8": 36, "int8_unsigned": 30, "int8_companded": 33, "int8_companded_unsigned": 34},
    **{"fp8": 27, "fp8_unsigned": 32, "int4": 48, "int4_unsigned": 35},
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
