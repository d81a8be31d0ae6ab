"""Takes SASS instructions apart: what guards them, what they write and what they read."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from .machine_code import INSTRUCTION
from .machine_words import COMPARISONS

_REGISTER = re.compile(r"(U?R)(\d+|Z)(\.64)?")
_PREDICATE = re.compile(r"(U?P)(\d+|T)")
_CONSTANT = re.compile(r"c\[0x([0-9a-f]+)\]\[(?:(U?R\w+)\+?)?(?:0x([0-9a-f]+))?\]")
_ADDRESS = re.compile(r"(?:desc\[\w+\])?\[([^\]]*)\]")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}

Kind = Literal["register", "predicate", "immediate", "constant", "address", "special"]


class UnknownCodeError(Exception):
    """Something in a kernel that cannot be followed: where, and why."""


@dataclass(frozen=True)
class Operand:
    """One operand; ``sign`` is what stands before it.

    ``name``: of a register, a predicate or a special one; of an address and a constant the registers that are
    added to ``number``. ``bank``: of a constant.
    """

    kind: Kind
    name: str = ""
    number: int = 0
    sign: str = ""
    bank: int = 0
    names: tuple[str, ...] = ()

    @property
    def is_zero(self) -> bool:
        """Whether it is a register that always is zero."""
        return self.name in ("RZ", "URZ")


def _float_bits(text: str, halves: bool) -> int | None:
    try:
        number = float(text.replace("INF", "inf").replace("QNAN", "nan").replace("SNAN", "nan"))
    except ValueError:
        return None
    return int.from_bytes(struct.pack("<e" if halves else "<f", number), "little")


def _operand(text: str, halves: bool) -> Operand:
    sign, body = "", text.strip().replace(".reuse", "")
    if found := _ADDRESS.fullmatch(body):
        terms = [term.strip() for term in found[1].split("+") if term.strip()]
        number = sum(int(term, 16) for term in terms if "0x" in term)
        return Operand("address", number=number, names=tuple(term for term in terms if "0x" not in term))
    if re.fullmatch(r"[+-]?0x[0-9a-f]+", body):
        return Operand("immediate", number=int(body, 16) & 0xFFFFFFFF)
    bits = _float_bits(body, halves)
    if bits is not None:
        return Operand("immediate", number=bits)
    if body[:1] in ("-", "~", "!", "|"):
        sign, body = body[0], body.strip("-~!|")
    if found := _REGISTER.match(body):
        return Operand("register", found[1] + found[2], sign=sign)
    if _PREDICATE.fullmatch(body):
        return Operand("predicate", body, sign=sign)
    if found := _CONSTANT.match(body):
        return Operand(
            "constant", found[2] or "", int(found[3] or "0", 16), sign=sign, bank=int(found[1], 16)
        )
    return Operand("special", body, sign=sign)


@dataclass(frozen=True)
class Code:
    """One instruction of a kernel; ``guard`` is the predicate that must hold, if there is one."""

    address: int
    guard: Operand | None
    opcode: str
    text: str

    @cached_property
    def parts(self) -> frozenset[str]:
        """The opcode's, without the first."""
        return frozenset(self.opcode.split(".")[1:])

    @cached_property
    def base(self) -> str:
        """The opcode's first part."""
        return self.opcode.partition(".")[0]

    @cached_property
    def operands(self) -> list[Operand]:
        """All of them, in order."""
        texts = [text for text in self.text.split(",") if text.strip()]
        return [_operand(text, self.base == "HFMA2") for text in texts]

    @cached_property
    def width(self) -> int:
        """Bytes that an access moves for a thread."""
        return next((_WIDTHS[part] for part in self.parts if part in _WIDTHS), 4)

    @cached_property
    def streams(self) -> bool:
        """Whether it moves elements, which nothing but streaming accesses do."""
        return self.base in ("LDG", "STG") and "EF" in self.parts

    @cached_property
    def written(self) -> tuple[Operand | None, list[Operand]]:
        """The register and the predicates that an instruction writes which computes."""
        kinds = [operand.kind for operand in self.operands]
        most = 2 if self.base in COMPARISONS else 1
        first = next((i for i, kind in enumerate(kinds) if kind != "predicate" or i == most), len(kinds))
        if self.base in (*COMPARISONS, "FCHK", "VOTEU"):
            return None, self.operands[:first]
        if kinds[first : first + 1] != ["register"]:
            return None, self.operands[:first]
        last = first + 1
        while first == 0 and kinds[last : last + 1] == ["predicate"]:
            last += 1
        return self.operands[first], [*self.operands[:first], *self.operands[first + 1 : last]]

    @cached_property
    def inputs(self) -> list[Operand]:
        """What it reads, in order."""
        register, predicates = self.written
        return self.operands[len(predicates) + (register is not None) :]

    @cached_property
    def words_written(self) -> int:
        """Registers, one after the other, that it writes."""
        if self.base in ("LD", "LDG", "LDS", "LDC", "ULDC", "LDCU"):
            return max(1, self.width // 4)
        wide = "WIDE" in self.parts or (self.base == "CS2R" and "32" not in self.parts)
        wide = wide or self.base.startswith("D") or (self.base[0] in "FI" and "F64" in self.parts)
        return 2 if wide or (self.base == "F2I" and self.parts & {"U64", "S64"}) else 1

    @cached_property
    def target(self) -> int:
        """Where it jumps to, or where threads meet again."""
        return self.operands[-1].number


def decoded(sass: str) -> list[Code]:
    """The instructions of one kernel."""
    found = list[Code]()
    for match in INSTRUCTION.finditer(sass):
        guard = _operand(match[2], False) if match[2] else None
        found.append(Code(int(match[1], 16), guard, match[3], match[4]))
    return found


def following(name: str, k: int) -> str:
    """The name of the register that is ``k`` behind one."""
    letters = "UR" if name.startswith("U") else "R"
    return f"{letters}{int(name.removeprefix(letters)) + k}" if k and not name.endswith("Z") else name
