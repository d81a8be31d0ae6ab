"""What integer and logic instructions of SASS compute, for values that may be unknown.

A value is an integer that all threads of a block share, one integer a thread, or unknown: what comes from a
tensor. Floating-point instructions give unknown values, comparisons excepted: a row says whether it is
active.
"""

from __future__ import annotations

import itertools
import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

THREADS = 128
"""Of a block: ``csrc/registers.cuh``."""

_WORD, _LONG = (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True)
class Partly:
    """A word of which some bits are ``unknown``; ptxas keeps predicates in the bits of a register."""

    known: int
    unknown: int


Lane = int | Partly | None
Value = Lane | tuple[Lane, ...]
"""None is unknown. As many entries as threads if they differ."""

Compute = Callable[[frozenset[str], Sequence[int]], tuple[int, ...]]
"""From an opcode's parts and its inputs: the register that it writes, then predicates."""


def lanes(value: Value) -> tuple[Lane, ...]:
    """One entry a thread."""
    return value if isinstance(value, tuple) else (value,) * THREADS


def shared(values: Sequence[Lane]) -> Value:
    """One value if it is the same in all threads."""
    first = values[0]
    return first if all(value == first for value in values) else tuple(values)


def merged(mask: int, new: Value, old: Value) -> Value:
    """``new`` in the threads of a mask, ``old`` in all others."""
    pairs = zip(lanes(new), lanes(old), strict=True)
    return shared([a if mask >> i & 1 else b for i, (a, b) in enumerate(pairs)])


def each(function: Callable[..., int | None], *values: Value) -> Value:
    """A function of values, thread by thread where they differ; unknown where one of them is."""

    def of_thread(*row: Lane) -> Lane:
        return function(*row) if all(isinstance(value, int) for value in row) else None

    if not any(isinstance(value, tuple) for value in values):
        return of_thread(*(lanes(value)[0] for value in values))
    return shared([of_thread(*row) for row in zip(*map(lanes, values), strict=True)])


def _bits(lane: Lane) -> tuple[int, int]:
    if isinstance(lane, Partly):
        return lane.known, lane.unknown
    return (0, _WORD) if lane is None else (lane & _WORD, 0)


def _word(known: int, unknown: int) -> Lane:
    return known if not unknown else None if unknown == _WORD else Partly(known & ~unknown, unknown)


def either(first: Value, second: Value) -> Value:
    """What is known of a register that has one of two values."""

    def of_thread(a: Lane, b: Lane) -> Lane:
        (x, of_x), (y, of_y) = _bits(a), _bits(b)
        return _word(x & y, of_x | of_y | (x ^ y))

    return shared([*map(of_thread, lanes(first), lanes(second))])


def _logic(a: Lane, b: Lane, c: Lane, table: Lane) -> tuple[Lane, Lane]:
    """LOP3: any function of three bits, by its table; a predicate says whether the result is not zero."""
    can_be = list[tuple[int, int]]()
    for lane in (a, b, c):
        known, unknown = _bits(lane)
        can_be.append((~known & _WORD | unknown, known | unknown))
    values = [0, 0]
    for index in range(8):
        possible = can_be[0][index >> 2] & can_be[1][index >> 1 & 1] & can_be[2][index & 1]
        assert isinstance(table, int)
        values[table >> index & 1] |= possible
    zero, one = values
    return _word(one & ~zero, one & zero), 1 if one & ~zero else None if one else 0


def combined_bits(inputs: Sequence[Value]) -> tuple[Value, ...]:
    """What LOP3 writes; bits that are not known may still give some that are."""
    if not any(isinstance(value, tuple) for value in inputs[:4]):
        single = [lanes(value)[0] for value in inputs[:4]]
        return _logic(*single)
    results = [_logic(*row) for row in zip(*map(lanes, inputs[:4]), strict=True)]
    return tuple(shared(column) for column in zip(*results, strict=True))


def packed(before: Value, bits: Sequence[Value]) -> Value:
    """A word with its lowest bits replaced, save those that are 2."""

    def of_thread(lane: Lane, *row: Lane) -> Lane:
        known, unknown = _bits(lane)
        for i, bit in enumerate(row):
            if bit != 2:
                known, unknown = known & ~(1 << i), unknown & ~(1 << i)
                known, unknown = (
                    (known | bit << i, unknown) if isinstance(bit, int) else (known, unknown | 1 << i)
                )
        return _word(known, unknown)

    return shared([of_thread(*row) for row in zip(lanes(before), *map(lanes, bits), strict=True)])


def word_of(value: Value, k: int) -> Value:
    """The word number ``k`` of a longer value."""

    def of_thread(lane: Lane) -> Lane:
        return lane >> 32 * k & _WORD if isinstance(lane, int) else lane if k == 0 else None

    return shared([*map(of_thread, value)]) if isinstance(value, tuple) else of_thread(value)


def signed(x: int) -> int:
    """32 bits as a signed number."""
    x &= _WORD
    return x - (1 << 32) if x >> 31 else x


def _agreed(
    compute: Compute, parts: frozenset[str], inputs: Sequence[Lane], predicates: Sequence[bool], outputs: int
) -> tuple[Lane, ...]:
    numbers = [value if isinstance(value, int) else 0 for value in inputs]
    unknown = [i for i, value in enumerate(inputs) if not isinstance(value, int)]
    if not unknown:
        return compute(parts, numbers)
    if not all(predicates[i] for i in unknown):
        return (None,) * outputs
    found = list[tuple[int, ...]]()
    for choice in itertools.product((0, 1), repeat=len(unknown)):
        chosen = dict(zip(unknown, choice, strict=True))
        found.append(compute(parts, [chosen.get(i, number) for i, number in enumerate(numbers)]))
    return tuple(column[0] if len(set(column)) == 1 else None for column in zip(*found, strict=True))


def computed(
    compute: Compute, parts: frozenset[str], inputs: Sequence[Value], predicates: Sequence[bool], outputs: int
) -> tuple[Value, ...]:
    """What an instruction writes; of unknown predicates, what follows from both of their values."""
    single = [value for value in inputs if not isinstance(value, tuple)]
    if len(single) == len(inputs):
        return _agreed(compute, parts, single, predicates, outputs)
    rows = zip(*map(lanes, inputs), strict=True)
    results = [_agreed(compute, parts, row, predicates, outputs) for row in rows]
    # Of what is not known less may be said.
    return tuple(shared(column) for column in itertools.zip_longest(*results))


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    **{"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge},
    **{"EQ": operator.eq, "NE": operator.ne, "NEU": operator.ne},
}


def _combined(parts: frozenset[str], found: bool, before: int) -> tuple[int, ...]:
    def combined(one: int) -> int:
        return one & before if "AND" in parts else one | before if "OR" in parts else one ^ before

    return 0, combined(int(found)), combined(int(not found))


def _compare_integers(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    a, b, before, *low = inputs
    if "U32" not in parts:
        a, b = signed(a), signed(b)
    name = next(name for name in _COMPARE if name in parts)
    found = _COMPARE[name](a, b)
    if "EX" in parts:
        # Of the upper halves; `low` is how the lower ones compare.
        strict = {"LE": "LT", "GE": "GT"}.get(name, name)
        equal_and_low = a == b and bool(low[0])
        found = _COMPARE[strict](a, b) or equal_and_low if name != "EQ" else equal_and_low
    return _combined(parts, found, before)


def _as_float(bits: int) -> float:
    """A float of fp32 bits."""
    return struct.unpack("<f", struct.pack("<I", bits & _WORD))[0]


def _compare_floats(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    a, b, before = inputs
    x, y = _as_float(a), _as_float(b)
    name = next(name for name in ("NAN", "NUM", "GEU", "GTU", "LEU", "LTU", *_COMPARE) if name in parts)
    nan = x != x or y != y
    if name in ("NAN", "NUM"):
        return _combined(parts, nan == (name == "NAN"), before)
    # U: or unordered.
    found = _COMPARE[name[:2]](x, y) and not nan
    return _combined(parts, found or (nan and name.endswith("U")), before)


def _add(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    total = sum(inputs)
    return total, int(total >= 1 << 32), int(total >= 1 << 33)


def _multiply_add(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    a, b, c, *carry = inputs
    wide = "WIDE" in parts or "HI" in parts
    if wide and "U32" not in parts:
        a, b = signed(a), signed(b)
    total = a * b + c + sum(carry)
    limit = 64 if wide else 32
    return (total & _LONG) >> 32 if "HI" in parts else total, int(total >= 1 << limit)


def _shift_add(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    if "HI" not in parts:
        a, b, shift = inputs
        total = (a << shift & _WORD) + b
    elif "SX32" in parts:
        a, b, shift, *carry = inputs
        total = ((signed(a) << shift) >> 32 & _WORD) + b + sum(carry)
    else:
        a, b, high, shift, *carry = inputs
        total = (((high << 32 | a) << shift) >> 32 & _WORD) + b + sum(carry)
    return total, int(total >= 1 << 32)


def _predicate_logic(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    a, b, c, *tables = inputs
    return 0, *(table >> (a << 2 | b << 1 | c) & 1 for table in tables)


def _select(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    a, b, which = inputs
    return (a if which else b,)


def _extreme(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    *values, smallest = inputs if "U32" in parts else [*map(signed, inputs)]
    return ((min if smallest else max)(values),)


def _add_extreme(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    a, b, *others = inputs
    return _extreme(parts, [a + b & _WORD, *others])


def _shift(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    low, shift, high = inputs
    both, limit = high << 32 | low, 64 if parts & {"U64", "S64"} else 32
    shift = shift % limit if "W" in parts else min(shift, limit)
    if parts & {"S32", "S64"}:
        both -= (high >> 31) << 64
    shifted = both << shift if "L" in parts else both >> shift
    return (shifted >> (32 if "HI" in parts else 0),)


def _permute(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    a, selector, b = inputs
    both, result = b << 32 | a, 0
    for i in range(4):
        choice = selector >> 4 * i & 0xF
        byte = both >> 8 * (choice & 7) & 0xFF
        if choice & 8:
            byte = 0xFF if byte >> 7 else 0
        result |= byte << 8 * i
    return (result,)


def _half_constants(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    """How ptxas writes a constant; the immediates are floats, kept as the bits of fp16."""
    _, _, high, low = inputs
    return (high << 16 | low,)


def _first(parts: frozenset[str], inputs: Sequence[int]) -> tuple[int, ...]:
    return (inputs[0],)


OPERATIONS: dict[str, Compute] = {
    **dict.fromkeys(("ISETP", "UISETP"), _compare_integers),
    "FSETP": _compare_floats,
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD"), _add),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply_add),
    **dict.fromkeys(("LEA", "ULEA"), _shift_add),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _predicate_logic),
    **dict.fromkeys(("SEL", "USEL"), _select),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIMNMX3"), _extreme),
    "VIADDMNMX": _add_extreme,
    **dict.fromkeys(("SHF", "USHF"), _shift),
    "PRMT": _permute,
    "HFMA2": _half_constants,
    **dict.fromkeys(("MOV", "UMOV", "R2UR", "S2R", "S2UR", "CS2R", "LDC", "ULDC", "LDCU"), _first),
}
"""By the first part of an opcode."""

COMPARISONS = ("ISETP", "UISETP", "FSETP", "PLOP3", "UPLOP3")
"""What writes two predicates, and no register."""

OF_DATA = (
    *("FADD", "FMUL", "FFMA", "FSEL", "FMNMX", "MUFU", "HADD2", "HMUL2", "F2F", "F2FP", "F2I", "I2F", "I2FP"),
    *("DADD", "DMUL", "DFMA", "SHFL", "FCHK", "VOTEU"),
)
"""Floating point, and what threads ask each other: unknown."""
