"""Narrow floats by definition: the nearest of all representable values, ties to the even significand."""

from __future__ import annotations

import numpy as np

Array = np.ndarray

_EXPONENT_BITS = {"bf16": 8, "fp16": 5}


def every_value(codec: str) -> Array:
    """The value of each of the 65536 bit patterns of a 16-bit format, as float64 (IEEE 754, 3.4)."""
    exponent_bits = _EXPONENT_BITS[codec]
    fraction_bits = 15 - exponent_bits
    pattern = np.arange(1 << 16)
    sign = np.where(pattern >> 15, -1.0, 1.0)
    exponent = (pattern >> fraction_bits) & ((1 << exponent_bits) - 1)
    fraction = (pattern & ((1 << fraction_bits) - 1)) / 2.0**fraction_bits
    bias = (1 << (exponent_bits - 1)) - 1
    normal = (1 + fraction) * 2.0 ** (exponent - bias)
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)
    special = np.where(fraction == 0, np.inf, np.nan)
    return sign * np.where(exponent == (1 << exponent_bits) - 1, special, value)


def nearest(codec: str, values: Array) -> Array:
    """The bit pattern that each value is rounded to; NaN becomes -1."""
    table = every_value(codec)
    positive = table[: 1 << 15]
    last = int(np.flatnonzero(np.isfinite(positive))[-1])
    finite = positive[: last + 1]
    magnitude = np.abs(values.astype(np.float64))
    # Beyond the largest value the format would go on by one more step, were it not for infinity.
    ladder = np.append(finite, 2 * finite[-1] - finite[-2])
    above = np.clip(np.searchsorted(ladder, magnitude), 1, last + 1)
    below = above - 1
    to_above, to_below = ladder[above] - magnitude, magnitude - ladder[below]
    even = np.where(below % 2 == 0, below, above)
    pattern = np.where(to_above < to_below, above, np.where(to_below < to_above, below, even))
    pattern = pattern | (np.signbit(values).astype(pattern.dtype) << 15)
    return np.where(np.isnan(values), -1, pattern)


def nearest_in(ladder: Array, values: Array) -> Array:
    """The entry of an ascending ladder that is nearest to each value."""
    above = np.clip(np.searchsorted(ladder, values), 1, len(ladder) - 1)
    low, high = ladder[above - 1], ladder[above]
    return np.where(values - low <= high - values, low, high)
