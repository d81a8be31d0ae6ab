"""Codecs with a scale per block, in float64 from their definitions: values, and nearest by brute force."""

from __future__ import annotations

import numpy as np

from tests.oracles.codecs import nearest_in

Array = np.ndarray


def dynamic_map(signed: bool) -> Array:
    """Dettmers et al., 8-bit optimizers (arXiv 2110.02861): seven decades of a linear fraction each."""
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = np.linspace(0.1, 1.0, count + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [*middles, *(-middles if signed else [])]
    return np.sort(values)


def e4m3() -> Array:
    """Values of all bit patterns of the OCP 8-bit float E4M3 (no infinity, one NaN per sign)."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, (code & 7) / 8
    magnitude = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    magnitude = np.where((code & 127) == 127, np.nan, magnitude)
    return np.where(code >> 7, -magnitude, magnitude)


def softsign() -> Array:
    """y = 2n / (1 + |n|) in steps of 1/127, by two's complement code (-128 is never used)."""
    q = np.arange(256).astype(np.uint8).view(np.int8).astype(np.float64)
    return np.where(q == -128, np.nan, q / (254 - np.abs(q)))


TORCHAO_4_BITS = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]

VALUES: dict[str, Array] = {
    "int8": dynamic_map(True),
    "int8_unsigned": dynamic_map(False),
    "int8_companded": softsign(),
    "int8_companded_unsigned": (np.arange(256) / 255) ** 2,
    "fp8": e4m3() / 448,
    "fp8_unsigned": np.where(np.arange(256) < 128, e4m3() / 448, np.nan),
    "int4": np.array([*(-x for x in reversed(TORCHAO_4_BITS)), 0.0, *TORCHAO_4_BITS, 1.0]),
    "int4_unsigned": ((np.arange(16) + 1) / 16) ** 4,
}
"""What each code stands for, in units of the block's scale; NaN for codes that are never written."""

_COMPANDED = {
    "int8_companded": lambda n: 2 * n / (1 + np.abs(n)),
    "int8_companded_unsigned": np.sqrt,
    "int4_unsigned": lambda n: np.sqrt(np.sqrt(n)),
}
"""Where codes are equidistant, and nearest is meant there."""


def distance_to_nearest(codec: str, values: Array, n: Array, code: Array) -> tuple[Array, Array]:
    """Of each normalised value: the distance to what its code stands for, and to the nearest of all codes.

    ``values``: what the codes stand for, rounded as they are stored.
    """
    companded = _COMPANDED.get(codec, lambda x: x)
    with np.errstate(invalid="ignore"):
        table = companded(values)
    points = companded(n.astype(np.float64))
    ladder = np.sort(table[~np.isnan(table)])
    return np.abs(table[code] - points), np.abs(nearest_in(ladder, points) - points)
