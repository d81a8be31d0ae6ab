"""Constant tables that kernels look values up in, built once in NumPy and kept per device.

A table of the 8-bit dynamic maps is one blob: ``value`` (256 floats: code to value), ``steps`` (64 Ki words:
from the upper half of a number's bits to what makes the sum with all of them show its code) and, for
processors that permute registers faster than they gather, ``lines`` (4 rows of 16 floats) and planes, each
with one byte of every entry, of ``value`` and of 128 or 256 middles.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray

STEPS = 1024
"""Where ``steps`` begin, in bytes."""

LINES = STEPS + 4 * 2**16
"""Where ``lines`` begin, in bytes."""


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


def _lines(signed: bool) -> Array:
    """A magnitude's code without steps: 16 of each of two slopes and offsets.

    Between two powers of four the number of middles below ``x`` is the integer part of ``min(slope * x +
    offset)`` over two lines, or one more. Entry ``e // 2 % 16`` is for exponents (as they are stored) of
    ``e``; less than 102 count as 102. Each decade is a line, and the slopes fall, so the least one is right.
    """
    inner = middles(magnitudes(signed))
    first, ninth = (1 if signed else 2), 1 / np.float64(0.9)
    entries, scales = first * 2.0 ** np.arange(7), 10.0 ** np.arange(6, -1, -1)
    # Below the first middle there is none; a decade's first middle lies 0.2 behind its line.
    slopes = np.concatenate([[1 / np.float64(inner[0])], scales * entries * ninth])
    offsets = np.concatenate([[0.0], entries * (1 - 0.1 * ninth) + (1 - first)]) - 0.3
    starts = np.ldexp(1.0, np.arange(-25, 1, 2))
    both = []
    for x in (starts, 4 * starts):
        best = np.argmin(slopes * x[:, None] + offsets, axis=1)
        both += [slopes[best], offsets[best]]
    rows = [np.pad(each, (3, 0), mode="edge").astype(np.float32) for each in both]
    return np.concatenate(rows)


def _planes(entries: Array) -> Array:
    """The first bytes of all entries, then their second ones, and so on; 128 or 256 entries, the last Inf."""
    filled = np.pad(entries, (0, -len(entries) % 128), constant_values=np.inf)
    return np.ascontiguousarray(filled.view(np.uint8).reshape(-1, 4).T).ravel()


def _dynamic(signed: bool) -> Array:
    values, inner = dynamic_map(signed), middles(magnitudes(signed))
    parts = values, _steps(signed), _lines(signed), _planes(values), _planes(inner)
    return np.concatenate([part.view(np.uint8) for part in parts])


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
