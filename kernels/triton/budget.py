"""Launch shapes and the default arithmetic: pure functions of the storage, free of torch and triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..spec import Codec, Rule, bytes_moved


class Gpu(NamedTuple):
    """Multiprocessors, their clock under load in GHz, and the memory's TB/s by the data sheet."""

    multiprocessors: int
    clock: float
    bandwidth: float


GPUS = {80: Gpu(108, 1.41, 2.04), 90: Gpu(132, 1.75, 4.8), 100: Gpu(148, 1.85, 8.0)}
"""A100 (SXM, 80 GB), H200 and B200 by capability. Data sheets give 1.98 GHz of the last two, at most."""

COPIED_SHARE = 4.3 / 4.8
"""Of the bandwidth that a copy reaches, read and written bytes together: an H200's, assumed of all."""


def instructions_per_byte(capability: int = 90) -> float:
    """What a GPU issues while it copies one byte: 32 lanes of four schedulers a multiprocessor and clock.

    To a tenth, as clocks are not known better: A100 10.7, H200 6.9, B200 4.9; others count as an H200. A100s
    multiply and add fp32 at half that rate, which is not in it.
    """
    gpu = GPUS.get(capability, GPUS[90])
    issued = gpu.multiprocessors * 4 * 32 * gpu.clock * 1e9
    return round(issued / (gpu.bandwidth * 1e12 * COPIED_SHARE), 1)


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
    **{"bf16_sr": 11, "bf16_kahan": 9, "fp16_kahan": 8, "bf16_split8": 8, "bf16_split16": 6},
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


def register_bound(rule: Rule, codecs: Sequence[Codec], exact: bool, capability: int) -> int | None:
    """Registers that a thread may have at most; None leaves it to ptxas, because most would only grow.

    Left alone, it keeps some kernels to 72, 96 or 128 and spills 8 to 24 bytes (Triton 3.7 and 3.9).
    """
    blocks = sum(codec.block > 1 for codec in codecs)
    if rule.inner is not None or blocks == 0:
        return None
    if capability >= 100:
        own = OWN_BOUNDS.get((rule.name, codecs[0].name, codecs[1].name, exact))
        if own is not None or blocks == 1:
            return own
        cost = sum(CODEC_INSTRUCTIONS.get(codec.name, 0) for codec in codecs)
        if blocks == 2 and exact and cost > 40:
            return 168 if cost > 60 else 144
        if blocks == 3 and not exact and cost > 100:
            return 128
    if not exact or blocks == 1:
        return None
    return 128 if blocks == 2 else 208


OWN_BOUNDS = {
    ("adam", "bf16_split8", "int4", False): 104,
    ("adam_amsgrad", "fp32", "int8_companded", False): 104,
    ("sgd_momentum", "bf16_split8", "int8_companded", False): 72,
    ("sgd_momentum", "bf16_sr", "int8", False): 80,
    ("sgd_momentum", "bf16_sr", "int4", False): 100,
    ("sgd_momentum", "bf16", "fp8", False): 96,
    ("sgd_momentum", "bf16", "fp8", True): 128,
}
"""By rule, parameter, first state, exactness; from sm_100 on. A bound would harm kernels that seem alike."""

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

    A rule that nobody has counted yet is taken to cost as much as the dearest. An H200's budget decides for
    every GPU: what a step computes does not depend on where a run goes on.
    """
    inner = rule.inner or rule
    instructions = EXACT_INSTRUCTIONS.get(inner.name, max(EXACT_INSTRUCTIONS.values()))
    instructions += 0 if inner is rule else MASK_INSTRUCTIONS[rule.group]
    instructions += sum(CODEC_INSTRUCTIONS.get(codec.name, 0) for codec in (param, *states))
    budget = instructions_per_byte() * sum(bytes_moved(rule, param, grad, states))
    return instructions <= USABLE_SHARE * budget
