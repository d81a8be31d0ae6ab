"""Tiles of the matrix products: a pure function of sizes, dtype and GPU, free of torch and triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Shape(NamedTuple):
    """A program's tile is ``side`` by ``2 side``; it reads ``depth`` columns at a time, ``stages`` ahead."""

    side: int
    depth: int
    stages: int
    warps: int


BAND = 4
"""Rows of squares, two tiles high, that are walked together: 132 tiles then share most of what they read."""


def boxes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Rows and columns that are fetched or stored at once, by operand; ``r`` is Q in halves of a tile."""
    side, depth = shape.side, shape.depth
    half, square = (side, depth), (side, side)
    return {"p": half, "q": (2 * side, depth), "r": half, "d": square, "out": square}


_MULTIPLIED = {8: 1024, 9: 2048, 10: 4096, 12: 1024}
"""16-bit products per clock and processor by major compute capability, of the data centre's GPUs."""

_PORT_BYTES, _CACHE_BYTES = 64, 5120
"""Bytes per clock that reach a processor, and that the second-level cache of an A100 or H100 gives in all."""


def has_boxes(capability: int) -> bool:
    """Whether the bulk copy engine feeds the tensor cores here; elsewhere threads copy 16 bytes each."""
    return 90 <= capability < 120


def shapes(bits: int, capability: int) -> tuple[Shape, ...]:
    """The tiles to choose from, the largest first.

    fp32 is split into parts for the tensor cores in registers, and has none left for a larger tile.
    """
    if bits == 32:
        return (Shape(64, 32, 3, 4),) if has_boxes(capability) else (Shape(64, 16, 4, 4),)
    if has_boxes(capability):
        return Shape(128, 64, 4, 8), Shape(64, 64, 4, 4)
    return Shape(128, 32, 4, 8), Shape(64, 32, 4, 4)


def triangle(m: int, side: int) -> tuple[int, int]:
    """Tiles below the diagonal of m by m, and half tiles on it: they cover each square of ``side`` once."""
    squares = -(-m // (2 * side))
    return squares * (squares - 1), 3 * squares


def rectangle(m: int, n: int, side: int) -> int:
    """Tiles that cover m by n."""
    return -(-m // side) * -(-n // (2 * side))


def multiplied_per_clock(bits: int, capability: int) -> float:
    """Multiplications of a processor's tensor cores."""
    return _MULTIPLIED.get(capability // 10, 2048) * 16 / bits


def clocks(shape: Shape, tiles: float, bits: int, capability: int, processors: int) -> float:
    """A model of the clocks that tiles take for each column of depth, by what they wait for."""
    multiplied = 2 * shape.side**2 / multiplied_per_clock(bits, capability)
    # A small tile leaves gaps between its instructions.
    multiplied *= 1.0 if shape.side >= 128 else 1.25
    fetched = 3 * shape.side * bits / 8
    rounds, busy = -(-tiles // processors), min(tiles, processors)
    return rounds * max(multiplied, fetched / _PORT_BYTES, fetched * busy / _CACHE_BYTES)


def _choose(tiles: Callable[[int], float], bits: int, capability: int, processors: int) -> Shape:
    candidates = shapes(bits, capability)
    return min(candidates, key=lambda s: clocks(s, tiles(s.side), bits, capability, processors))


def symmetric_shape(batches: int, m: int, bits: int, capability: int, processors: int) -> Shape:
    """The tile for one triangle of ``batches`` products that are m by m."""

    def tiles(side: int) -> float:
        whole, halves = triangle(m, side)
        return batches * (whole + halves / 2)

    return _choose(tiles, bits, capability, processors)


def rectangular_shape(batches: int, m: int, n: int, bits: int, capability: int, processors: int) -> Shape:
    """The tile for ``batches`` products that are m by n."""
    return _choose(lambda side: batches * rectangle(m, n, side), bits, capability, processors)
