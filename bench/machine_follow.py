"""Follows a compiled kernel through the way that one block takes for known launch values.

All threads of a block are followed together, in groups that are at the same instruction. Branches are
decided by what the launch is given. Where one depends on a tensor's values, as the rare cases of a division
do, the shorter way to where both meet is taken; it is an error if either moves elements or chooses codecs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from .machine_kernel import JUMPS, Kernel
from .machine_operands import Code, Operand, UnknownCodeError, following
from .machine_words import (
    OF_DATA,
    OPERATIONS,
    THREADS,
    Lane,
    Value,
    combined_bits,
    computed,
    each,
    either,
    lanes,
    merged,
    packed,
    word_of,
)

_ALL, _WORD = (1 << THREADS) - 1, (1 << 32) - 1
_WARPS = tuple(_WORD << first for first in range(0, THREADS, 32))
_ADDITIONS = ("IADD3", "UIADD3", "VIADD", "IMAD", "UIMAD")
_MOST_STEPS = 200_000


class Surroundings(Protocol):
    """What a launch gives to a kernel."""

    def constant(self, bank: int, offset: int, width: int) -> int | None:
        """What a bank of constants holds; None if it is not known."""
        ...

    def load(self, address: int, width: int) -> int | None:
        """What global memory holds."""
        ...


class Access(NamedTuple):
    """Elements that one thread moves at once."""

    address: int
    width: int
    store: bool


@dataclass
class Way:
    """What a block has done: instructions issued, counted for each warp; elements moved; unknown branches."""

    issued: int = 0
    accesses: set[Access] = field(default_factory=set[Access])
    guessed: set[int] = field(default_factory=set[int])

    @property
    def per_thread(self) -> float:
        """Instructions that one thread issues, on average."""
        return self.issued / len(_WARPS)


class Block:
    """One block of threads on its way through a kernel."""

    def __init__(self, kernel: Kernel, surroundings: Surroundings) -> None:
        self.kernel, self.surroundings, self.way = kernel, surroundings, Way()
        self._registers = dict[str, Value]({"RZ": 0, "URZ": 0, "PT": 1, "UPT": 1})
        self._memory = dict[int, int | None]()
        self._barriers = dict[str, int]()
        # Threads by the index of their next instruction; those that wait for others.
        self._at: dict[int, int] = {0: _ALL}
        self._waiting = dict[int, int]()
        self._alive = _ALL

    def follow(self) -> Way:
        """Runs until all threads have ended.

        Raises:
            UnknownCodeError: an instruction has no meaning here, or a way depends on a tensor's values.
        """
        for _ in range(_MOST_STEPS):
            if not self._at and not self._waiting:
                return self.way
            if not self._at:
                self._meet()
            index = min(self._at)
            mask = self._at.pop(index)
            one = self.kernel.code[index]
            self.way.issued += sum(mask & warp != 0 for warp in _WARPS)
            self._step(index, one, mask)
        raise UnknownCodeError(f"{self.kernel.name}: no end after {_MOST_STEPS} steps")

    def _go(self, index: int, mask: int) -> None:
        if mask:
            self._at[index] = self._at.get(index, 0) | mask

    def _meet(self) -> None:
        """Lets threads go on that wait at a barrier for no others any more."""
        for index, mask in list(self._waiting.items()):
            one = self.kernel.code[index]
            awaited = self._barriers[one.operands[0].name] if one.base == "BSYNC" else _ALL
            if not awaited & self._alive & ~mask:
                del self._waiting[index]
                self._go(index + 1, mask)
        if not self._at:
            raise UnknownCodeError(f"{self.kernel.name}: all threads wait for each other")

    def _lanes_of(self, one: Code, condition: Operand | None, mask: int) -> int | None:
        """Threads of a mask for which a predicate holds; None if that is not known."""
        if condition is None:
            return mask
        value = self._read(condition, one)
        if not isinstance(value, tuple):
            return None if not isinstance(value, int) else mask if value else 0
        if any(not isinstance(lane, int) and mask >> i & 1 for i, lane in enumerate(value)):
            return None
        return sum(1 << i for i, lane in enumerate(value) if lane) & mask

    def _step(self, index: int, one: Code, mask: int) -> None:
        base = one.base
        if base == "BRA":
            return self._branch(index, one, mask)
        active = self._lanes_of(one, one.guard, mask)
        if base in ("EXIT", *JUMPS, "CALL", "BSSY", "BSYNC", "BREAK", "BAR"):
            if active is None:
                raise self.kernel.error(one, "its predicate is not known")
            self._control(index, one, mask, active)
            return
        if base in ("LDG", "STG", "LD", "LDS", "STS"):
            self._access(one, mask if active is None else active, active is not None)
        elif base == "R2P":
            self._unpack_predicates(one, mask if active is None else active, active is not None)
        elif base not in ("NOP", "WARPSYNC") and active != 0:
            self._compute(one, mask if active is None else active, active is not None)
        self._go(index + 1, mask)

    def _branch(self, index: int, one: Code, mask: int) -> None:
        conditions = one.guard, (one.operands[0] if len(one.operands) > 1 else None)
        both = [self._lanes_of(one, condition, mask) for condition in conditions]
        if None in both and 0 not in both:
            self.way.guessed.add(one.address)
            return self._go(self.kernel.shorter(index), mask)
        taken = (both[0] or 0) & (both[1] or 0)
        self._go(self.kernel.index_of[one.target], taken)
        self._go(index + 1, mask & ~taken)

    def _control(self, index: int, one: Code, mask: int, active: int) -> None:
        rest, names = mask & ~active, [operand.name for operand in one.operands]
        if one.base == "EXIT":
            self._alive &= ~active
        elif one.base in ("BSYNC", "BAR"):
            self._waiting[index] = self._waiting.get(index, 0) | active
        elif one.base == "CALL":
            self._go(self.kernel.index_of[one.target], active)
        elif one.base in JUMPS:
            self._jump(one, self._read(one.operands[0], one), active)
        else:
            before = self._barriers.get(names[0], 0)
            self._barriers[names[0]] = before | active if one.base == "BSSY" else before & ~active
            self._go(index + 1, active)
        self._go(index + 1, rest)

    def _jump(self, one: Code, to: Value, active: int) -> None:
        for i, address in enumerate(lanes(to)):
            if active >> i & 1:
                if not isinstance(address, int) or address not in self.kernel.index_of:
                    raise self.kernel.error(one, "where it jumps to is not known")
                self._go(self.kernel.index_of[address], 1 << i)

    def _read(self, operand: Operand, one: Code | None = None, words: int = 1) -> Value:
        """The value of an operand, of two registers if it has as many words."""
        if operand.kind == "immediate":
            return operand.number
        if operand.kind == "constant":
            value = self._constant(operand, 4 * words)
        elif operand.kind == "special":
            return self._special(operand)
        else:
            value = self._registers.get(operand.name, 0)
            if words == 2 and not operand.is_zero:
                high = self._registers.get(following(operand.name, 1), 0)
                value = each(lambda low, high: high << 32 | low, value, high)
        if not operand.sign:
            return value
        if operand.kind == "predicate":
            return each(lambda x: 1 - x, value)
        if operand.sign == "|":
            return each(lambda x: x & 0x7FFFFFFF, value)
        if operand.sign == "~":
            return each(lambda x: ~x & _WORD, value)
        # Unmasked, so that a difference carries as adding a complement and one does.
        keep = (1 << 33) - 1 if one and one.base in _ADDITIONS else _WORD
        return each(lambda x: (1 << 32) - x & keep, value)

    def _special(self, operand: Operand) -> Value:
        known: Mapping[str, Value] = {
            "SR_TID.X": tuple(range(THREADS)),
            **dict.fromkeys(("SR_CTAID.X", "SR_CgaCtaId", "SRZ"), 0),
        }
        return known.get(operand.name)

    def _constant(self, operand: Operand, width: int) -> Value:
        index = self._registers.get(operand.name, 0) if operand.name else 0
        return each(lambda i: self.surroundings.constant(operand.bank, operand.number + i, width), index)

    def _write(self, name: str, value: Value, mask: int, known: bool = True) -> None:
        """To the threads of a mask; if it is not known whether they write, what is common remains."""
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        if not known:
            value = either(value, self._registers.get(name, 0))
        if name.startswith("U"):
            # A warp has one.
            mask = sum(warp for warp in _WARPS if mask & warp)
        whole = mask & self._alive == self._alive
        self._registers[name] = value if whole else merged(mask, value, self._registers.get(name, 0))

    def _write_words(self, first: str, value: Value, words: int, mask: int, known: bool = True) -> None:
        for i in range(words):
            self._write(following(first, i), word_of(value, i), mask, known)

    def _compute(self, one: Code, mask: int, known: bool) -> None:
        register, predicates = one.written
        results: Sequence[Value] = (None,) * (1 + len(predicates))
        if one.base in ("P2R", "UP2UR"):
            results = (self._packed_predicates(one),)
        elif one.base in ("LOP3", "ULOP3"):
            results = combined_bits([self._read(operand, one) for operand in one.inputs])
        elif one.base in OPERATIONS and not _is_of_data(one):
            results = self._results(one, len(predicates))
        elif one.base not in (*OF_DATA, *OPERATIONS):
            raise self.kernel.error(one, "this instruction is not known")
        if register is not None:
            self._write_words(register.name, results[0], one.words_written, mask, known)
        for predicate, value in zip(predicates, (*results[1:], None, None), strict=False):
            self._write(predicate.name, value, mask, known)

    def _results(self, one: Code, predicates: int) -> Sequence[Value]:
        inputs = one.inputs
        if one.base in ("LDC", "ULDC", "LDCU"):
            value = self._constant(inputs[0], one.width)
            if one.parts & {"S8", "S16"}:
                top = 8 * one.width - 1
                value = each(lambda x: (x ^ 1 << top) - (1 << top) & _WORD, value)
            return (value,)
        longs = {"IMAD": 2, "UIMAD": 2}.get(one.base) if one.parts & {"WIDE", "HI"} else None
        values = [self._read(operand, one, 2 if i == longs else 1) for i, operand in enumerate(inputs)]
        flags = [operand.kind == "predicate" for operand in inputs]
        return computed(OPERATIONS[one.base], one.parts, values, flags, 1 + predicates)

    def _packed_predicates(self, one: Code) -> Value:
        """P2R and UP2UR: the lower predicates as bits of a register."""
        _, _, rest, which = one.operands
        kind = "UP" if one.base == "UP2UR" else "P"
        selected = [which.number >> i & 1 for i in range(7)]
        bits = [self._registers.get(f"{kind}{i}", 0) if chosen else 2 for i, chosen in enumerate(selected)]
        return packed(self._read(rest, one), bits)

    def _unpack_predicates(self, one: Code, mask: int, known: bool) -> None:
        _, source, which = one.operands
        value = self._read(source, one)
        for i in range(7):
            if which.number >> i & 1:
                _, bit = combined_bits([value, 1 << i, 0, 0xC0])
                self._write(f"P{i}", bit, mask, known)

    def _address(self, operand: Operand) -> Value:
        value: Value = operand.number
        for name in operand.names:
            long = name.endswith(".64")
            register = Operand("register", name.removesuffix(".64"))
            term = self._read(register, words=2 if long else 1)
            value = each(lambda a, b: a + b, value, term)
        return value

    def _access(self, one: Code, mask: int, known: bool) -> None:
        if not mask:
            return
        place = next(operand for operand in one.operands if operand.kind == "address")
        address = self._address(place)
        if one.base in ("STG", "STS"):
            return self._store(one, address, mask, known)
        target = one.operands[0].name
        if one.streams:
            self._move(one, address, mask, known)
            return self._write_words(target, None, one.words_written, mask)
        load = self._load_shared if one.base == "LDS" else self.surroundings.load
        masked = merged(mask, address, 0)
        for k in range(one.words_written):
            value = each(lambda a, k=k: load(a + 4 * k, min(4, one.width)), masked) if known else None
            self._write(following(target, k), value, mask)

    def _store(self, one: Code, address: Value, mask: int, known: bool) -> None:
        if one.base == "STG":
            if not one.streams:
                raise self.kernel.error(one, "it stores something that is no element")
            return self._move(one, address, mask, known)
        source = one.operands[-1]
        for k in range(max(1, one.width // 4)):
            name = source.name if source.is_zero else following(source.name, k)
            value = lanes(self._registers.get(name, 0) if known else None)
            for i, start in enumerate(lanes(address)):
                if mask >> i & 1:
                    if not isinstance(start, int):
                        raise self.kernel.error(one, "its address is not known")
                    self._store_word(start + 4 * k, min(4, one.width), value[i])

    def _store_word(self, start: int, width: int, word: Lane) -> None:
        for byte in range(width):
            self._memory[start + byte] = word >> 8 * byte & 0xFF if isinstance(word, int) else None

    def _load_shared(self, address: int, width: int) -> int | None:
        found = [self._memory.get(address + i) for i in range(width)]
        known = [byte for byte in found if byte is not None]
        return int.from_bytes(bytes(known), "little") if len(known) == width else None

    def _move(self, one: Code, address: Value, mask: int, known: bool) -> None:
        for i, start in enumerate(lanes(address)):
            if mask >> i & 1:
                if not isinstance(start, int) or not known:
                    raise self.kernel.error(one, "which elements it moves is not known")
                self.way.accesses.add(Access(start, one.width, one.base == "STG"))


def _is_of_data(one: Code) -> bool:
    """HFMA2 that is more than a constant, and comparisons of magnitudes or of negated values."""
    if one.base == "FSETP":
        return any(operand.sign and operand.kind != "predicate" for operand in one.inputs)
    return one.base == "HFMA2" and [operand.kind for operand in one.inputs[2:]] != ["immediate"] * 2
