"""Launch shapes and the default arithmetic: pure functions of the storage, free of torch and triton."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..spec import Codec, Rule, bytes_moved


class Shape(NamedTuple):
    """Elements per program, elements per masked chunk, elements per aligned access, warps."""

    tile: int
    chunk: int
    vector: int
    warps: int


def launch_shape(codecs: Iterable[Codec]) -> Shape:
    """The shape for kernels that touch planes of these codecs.

    The widest plane is read 16 bytes at a time. Narrower ones follow with as many elements: a wider
    access would have to be redistributed through shared memory (a barrier per plane, 16 more registers).
    """
    widest = max(plane.bits for codec in codecs for plane in codec.planes)
    return Shape(tile=2048, chunk=512, vector=128 // widest, warps=4)


def auto_exact(rule: Rule, param: Codec, grad: Codec, states: tuple[Codec, ...]) -> bool:
    """Whether exact arithmetic fits the issue slots that memory leaves: ``arithmetic="auto"``."""
    budget = 0.6 * 6.9 * sum(bytes_moved(rule, param, grad, states))
    return budget >= 57
