"""Masks in registers, and masked rules.

In registers a mask is one integer for the ``VECTOR`` neighbours that a thread has, the first in its lowest
bit: 16 booleans would not fit into the predicates that a thread has, and would go back and forth.
"""

import triton
import triton.language as tl

from .arithmetic import below, bits_of, float_of
from .tile import offsets

# All NaNs are one key above infinity's.
NAN_KEY = tl.constexpr(0x7F800001)


@triton.constexpr_function
def _levels(count):
    return count.bit_length() - 1


@triton.jit
def split(x, COUNT: tl.constexpr):
    """``COUNT`` tensors: the first, the second ... of every ``COUNT`` neighbours.

    The compiler lays neighbours that are split or joined into one thread; those of a new dimension of
    ``x`` it does not (measured: 8 KiB of shared memory and 23 barriers for groups of four).
    """
    parts = (x,)
    for level in tl.static_range(_levels(COUNT)):
        evens, odds = (), ()
        for i in tl.static_range(2**level):
            even, odd = tl.split(parts[i].reshape(parts[i].shape[0] // 2, 2))
            evens += (even,)
            odds += (odd,)
        parts = evens + odds
    return parts


@triton.jit
def spread(bits, VECTOR: tl.constexpr):
    """A mask's booleans, one for each element."""
    parts = ()
    for i in tl.static_range(VECTOR):
        parts += ((bits & 1 << i) != 0,)
    for _ in tl.static_range(_levels(VECTOR)):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            pair = tl.join(parts[i], parts[i + len(parts) // 2])
            joined += (pair.reshape(2 * parts[i].shape[0]),)
        parts = joined
    return parts[0]


@triton.jit
def _partner(x, DISTANCE: tl.constexpr):
    """Integers of the elements whose index differs in one bit: a shuffle, as their sum stays in registers."""
    SIZE: tl.constexpr = x.shape[0]
    x = x.reshape(SIZE // (2 * DISTANCE), 2, DISTANCE)
    return (tl.sum(x, 1)[:, None, :] - x).reshape(SIZE)


@triton.jit
def _first(dense, SPREAD: tl.constexpr):
    """The first of each thread's neighbours."""
    return SPREAD[0] * offsets(dense[1].shape[0] // SPREAD[0], 32, SPREAD[1])


@triton.jit
def _bytes(plane, dense, first):
    """Where the byte is that neighbours from ``first`` on are in."""
    return plane.to(tl.pointer_type(tl.uint8)) + dense[0] // 8 + first // 8


@triton.jit
def mask_decode(planes, home, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    first = _first(home[1], SPREAD)
    exist = None if home[1][3] is None else first < home[1][3]
    return tl.load(_bytes(planes[0], home[1], first), mask=exist).to(tl.int32) >> first % 8


@triton.jit
def mask_encode(bits, planes, home, stream, SPREAD: tl.constexpr, CODEC: tl.constexpr):
    VECTOR: tl.constexpr = SPREAD[0]
    first = _first(home[1], SPREAD)
    writes = first % 8 == 0
    if home[1][3] is None:
        bits &= (1 << VECTOR) - 1
    else:
        left = home[1][3] - first
        bits &= (1 << tl.minimum(tl.maximum(left, 0), VECTOR)) - 1
        writes &= left > 0
    bits <<= first % 8
    # All threads of a byte know it whole then, and the one with its lowest bit writes.
    for level in tl.static_range(_levels(8 // VECTOR)):
        bits |= _partner(bits, 2**level)
    tl.store(_bytes(planes[0], home[1], first), bits.to(tl.uint8), mask=writes)


@triton.jit
def _partners(parts, bit_flips: tl.constexpr):
    """What the thread has whose number differs in these bits."""
    theirs = ()
    for i in tl.static_range(len(parts)):
        x = parts[i]
        for bit in tl.static_range(bit_flips.bit_length()):
            if bit_flips >> bit & 1:
                x = _partner(x, 2**bit)
        theirs += (x,)
    return theirs


@triton.jit
def _ranks(keys, kept, GROUP: tl.constexpr, VECTOR: tl.constexpr):
    """How many of its group are larger than a value, less ``kept``."""
    ranks = ()
    for i in tl.static_range(VECTOR):
        rank = i % GROUP - kept
        for j in tl.static_range(i // GROUP * GROUP, i):
            rank += below(keys[j], keys[i])
        for j in tl.static_range(i + 1, min(i // GROUP * GROUP + GROUP, VECTOR)):
            rank -= below(keys[i], keys[j])
        ranks += (rank,)
    thread = tl.arange(0, keys[0].shape[0])
    for flips in tl.static_range(1, GROUP // VECTOR):
        theirs = _partners(keys, flips)
        # They win if they are equal and come first.
        first = below(thread ^ flips, thread)
        mine = ranks
        ranks = ()
        for i in tl.static_range(VECTOR):
            rank = mine[i]
            for j in tl.static_range(VECTOR):
                rank -= below(keys[i] + first, theirs[j])
            ranks += (rank,)
    return ranks


@triton.jit
def largest_of_groups(x, exist, kept, GROUP: tl.constexpr, VECTOR: tl.constexpr):
    """The mask of the ``kept`` largest magnitudes of each group; of equal ones the first are larger."""
    keys = tl.minimum((bits_of(x) & 0x7FFFFFFF).to(tl.int32), NAN_KEY)
    if exist is not None:
        keys = tl.where(exist, keys, -1)
    ranks = _ranks(split(keys, VECTOR), kept, GROUP, VECTOR)
    bits = ranks[0] >> 31 & 1
    for i in tl.static_range(1, VECTOR):
        bits |= ranks[i] >> (31 - i) & (1 << i)
    return bits


@triton.jit
def unmasked(p, g, s, k, exist, SPREAD: tl.constexpr, EXACT: tl.constexpr, RULE: tl.constexpr):
    return RULE[1](p, g, s, k, EXACT)


@triton.jit
def _or_zero(x, factor):
    """Zero if the factor is, by its bits: predicates are short here."""
    return float_of(bits_of(x).to(tl.int32) & below(0, (bits_of(factor) & 0x7FFFFFFF).to(tl.int32)))


@triton.jit
def masked(p, g, s, k, exist, SPREAD: tl.constexpr, EXACT: tl.constexpr, RULE: tl.constexpr):
    """A rule with a mask; ``RULE`` is ``(masked, inner, SCALARS, STATES, LOOKS, GROUP, DENSE)``."""
    SCALARS: tl.constexpr = RULE[2]
    STATES: tl.constexpr = RULE[3]
    GROUP: tl.constexpr = RULE[5]
    pruned_grad, pruned_decay, pruned_scale, kept = k[SCALARS:]
    bits, states = s[STATES], s[:STATES]
    keep = spread(bits, SPREAD[0])
    if RULE[4]:
        states += (keep,)
    if RULE[6]:
        # Nothing else asks for the parameter, so that it is never loaded.
        p = s[STATES + 1]
    g = tl.where(keep, g, _or_zero(g, pruned_grad) + pruned_decay * p)
    p, states = RULE[1](p, g, states, k[:SCALARS], EXACT)
    if GROUP:
        largest = largest_of_groups(p, exist, kept.to(tl.int32), GROUP, SPREAD[0])
        bits = tl.where(kept > 0, largest, bits)
        keep = spread(bits, SPREAD[0])
    shown = tl.where(keep, p, _or_zero(pruned_scale * p, pruned_scale))
    states += (bits, p) if RULE[6] else (bits,)
    return shown, states
