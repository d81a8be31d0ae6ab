"""Constant tables that kernels look values up in, built once in NumPy and kept per device.

A table of the 8-bit dynamic maps is one blob: ``value`` (256 floats: code to value) and ``steps`` (64 Ki
words: from the upper half of a number's bits to what makes the sum with all of them show its code).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray

STEPS = 1024
"""Where ``steps`` begin, in bytes."""


def _decades(signed: bool) -> list[Array]:
    """Positive entries of each decade, 1e-6 first: the middles of equal steps from 0.1 to 1, in fp32."""
    one, tenth = np.float32(1), np.float32(0.1)
    decades = []
    for i in range(7):
        steps = 2**i if signed else 2 ** (i + 1)
        k = np.arange(steps + 1)
        step = np.float64((one - tenth) / np.float32(steps))
        # From both ends and with one rounding, as torch.linspace: the entries of every checkpoint there is.
        ladder = np.where(k < (steps + 1) // 2, tenth + step * k, one - step * (steps - k)).astype(np.float32)
        middles = (ladder[:-1] + ladder[1:]) / np.float32(2)
        decades.append(np.float32(10.0 ** (i - 6)) * middles)
    return decades


def dynamic_map(signed: bool) -> Array:
    """The 256 values of the dynamic map of Dettmers et al., ascending, fp32 (arXiv 2110.02861)."""
    positive = np.concatenate(_decades(signed))
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    negative = -positive[::-1] if signed else positive[:0]
    return np.concatenate([negative, zero, positive, one])


def middles(ascending: Array) -> Array:
    """Where the nearest entry changes: the largest fp32 number that is no nearer to the upper neighbour."""
    exact = (ascending[:-1].astype(np.float64) + ascending[1:]) / 2
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(0)), rounded)


def magnitudes(signed: bool) -> Array:
    """What the magnitude of a normalised value is compared with: the map's entries from zero on."""
    values = dynamic_map(signed)
    return values[values >= 0]


def _steps(signed: bool) -> Array:
    """For each upper half ``u`` of fp32 bits: ``steps[u] + bits`` has the sign on top, below it the code.

    Among the numbers that share ``u`` the code changes once at most: a carry out of their lower halves makes
    the step. Codes of negative numbers fall with the magnitude, so the signed map's are complemented (255 -
    code). NaN and Inf, which come from blocks without a finite scale, have the code of 0.
    """
    upper = np.arange(2**16, dtype=np.uint32)
    negative, magnitude = upper >> 15 == 1, upper & 0x7FFF
    ends = np.stack([magnitude << 16, magnitude << 16 | 0xFFFF]).view(np.float32)
    inner = middles(magnitudes(signed))
    index = np.searchsorted(inner, ends, side="left")
    # What a step is made at: the first middle from the lower end on.
    found = inner[np.minimum(index[0], len(inner) - 1)].view(np.uint32)
    low, high = index.astype(np.uint32)
    if signed:
        # The map has no -1.
        low, high = (np.where(negative, 128 + np.minimum(index, 127), 127 + index) for index in (low, high))
        zero = np.where(negative, 128, 127)
    else:
        zero = np.zeros_like(upper)
        # A second moment that is not zero never becomes zero.
        low, high = np.maximum(low, magnitude > 0), np.maximum(high, 1)
        low, high = (np.where(negative, zero, index) for index in (low, high))
    low, high = (np.where(magnitude < 0x7F80, index, zero).astype(np.uint32) for index in (low, high))
    assert (high - low <= 1).all()
    # The last number with the lower code: for unsigned tiny ones that is zero itself.
    last = np.where(found >> 16 == magnitude, found & 0xFFFF, 0)
    carry = np.where(high > low, 0xFFFF - last, 0).astype(np.uint32)
    return (low << 16) + carry + (negative.astype(np.uint32) << 31) - (upper << 16)


def _dynamic(signed: bool) -> Array:
    return np.concatenate([dynamic_map(signed).view(np.uint8), _steps(signed).view(np.uint8)])


SIGNED_FOUR_BITS: tuple[float, ...] = (
    *(-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0),
    *(0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0),
)
"""The dynamic map with 4 bits; its scale carries a sign, so that the largest magnitude is always exact."""


@cache
def table(name: str, device: torch.device) -> Tensor:
    """A table's bytes on a device, kept for the life of the process."""
    tables = {"dynamic_signed": True, "dynamic_unsigned": False}
    # A copy, because torch aligns its memory and NumPy need not.
    return torch.from_numpy(_dynamic(tables[name])).clone().to(device)
