"""Random bits: Philox-4x32-10 (Salmon et al., SC 2011), one counter for eight neighbours."""

import triton
import triton.language as tl

from .tile import offsets


@triton.jit
def _multiply(x, FACTOR: tl.constexpr):
    """High and low word of a 64-bit product: one instruction."""
    product = x.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def random_16_bits(place, stream, SPREAD: tl.constexpr):
    """16 random bits (uint32) for each element; ``stream`` is ``(slot, (seed, step, ordinal, drawn))``."""
    slot, whose = stream
    seed, step, ordinal, drawn = whose
    SIZE: tl.constexpr = place[1].shape[0]
    VECTOR: tl.constexpr = SPREAD[0]
    first = (place[0] >> 3).to(tl.uint64) + drawn
    low = first.to(tl.uint32)
    eighth = tl.add(low, offsets(SIZE // 8, 4 * VECTOR, SPREAD[1]).to(tl.uint32), sanitize_overflow=False)
    upper = (first >> 32).to(tl.uint32) + (eighth < low).to(tl.uint32)
    w0, w1, w2, w3 = _philox(eighth, upper, ordinal, slot, seed, step)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(SIZE // 2)
    return tl.join(words & 0xFFFF, words >> 16).reshape(SIZE)
