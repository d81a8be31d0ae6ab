"""Masks by definition: every way to keep some weights of a group or block is tried."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import numpy as np

Array = np.ndarray


def nm_mask(w: Array, n: int, m: int) -> Array:
    """Of ``[groups, m]`` the ``n`` weights of every group without which no other ``n`` would be larger.

    Of all ways to keep ``n``, in ascending order of the places that are kept, the first whose magnitudes,
    sorted from the largest, are not below those of another way. A NaN is above every number.
    """
    mask = np.zeros(w.shape, dtype=bool)
    for group, kept in zip(w, mask, strict=True):
        ranks = [(1, 0.0) if np.isnan(x) else (0, abs(float(x))) for x in group]
        ways = list(combinations(range(m), n))
        # max() takes the first of equal ways, combinations() gives them in ascending order.
        best = max(ways, key=lambda way: sorted((ranks[place] for place in way), reverse=True))
        kept[list(best)] = True
    return mask


def transposable_mask(block: Array) -> Array:
    """Of a 4x4 block the pattern of two ones in each row and column with the largest sum of magnitudes.

    Patterns are tried in ascending order of their 16 bits, the first element in the lowest; sums are added in
    fp32 in the order of elements, a NaN as zero.
    """
    magnitudes = np.abs(block.astype(np.float32)).reshape(16)
    magnitudes[np.isnan(magnitudes)] = 0
    best, chosen = np.float32(-1), np.zeros(16, dtype=bool)
    for pattern in patterns():
        total = np.float32(0)
        with np.errstate(over="ignore"):
            for x in magnitudes[pattern]:
                total = np.float32(total + x)
        if total > best:
            best, chosen = total, pattern
    return chosen.reshape(4, 4)


@cache
def patterns() -> list[Array]:
    """The binary 4x4 matrices with two ones in each row and column, among all of them."""
    found = []
    for bits in product((0, 1), repeat=16):
        pattern = np.array(bits[::-1], dtype=bool)
        if all(sum(bits[i : i + 4]) == 2 for i in (0, 4, 8, 12)):
            square = pattern.reshape(4, 4)
            if (square.sum(0) == 2).all() and (square.sum(1) == 2).all():
                found.append(pattern)
    return found


def bits(mask: Array) -> Array:
    """Eight neighbours in a byte, the first in its lowest bit."""
    packed = np.zeros((len(mask) + 7) // 8, dtype=np.uint8)
    for i, kept in enumerate(mask):
        packed[i // 8] |= int(kept) << (i % 8)
    return packed
