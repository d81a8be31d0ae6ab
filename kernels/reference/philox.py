"""Philox-4x32-10 (Salmon et al., SC 2011): random bits that depend on their counter and key only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


class Stream(NamedTuple):
    """Whose random bits: the group's seed, the parameter's step and index, and 0 for itself or 1 + slot.

    ``drawn`` counters belong to shards before this one.
    """

    seed: int
    step: int
    ordinal: int
    slot: int
    drawn: int = 0


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 64-bit product, from halves because int64 has a sign."""
    low, high = x * (factor & 0xFFFF), x * (factor >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _MASK


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64) for each counter of four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_16_bits(stream: Stream, numel: int, device: torch.device) -> Tensor:
    """16 random bits (as int64) for each element of a tensor: eight elements share a counter."""
    eighth = torch.arange(stream.drawn, stream.drawn - (-numel // 8), device=device)
    constant = torch.full_like(eighth, stream.ordinal), torch.full_like(eighth, stream.slot)
    words = philox((eighth & _MASK, eighth >> 32, *constant), (stream.seed, stream.step))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, 1).flatten()[:numel]
