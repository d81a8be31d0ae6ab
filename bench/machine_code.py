"""Reads compiled GPU kernels: memory traffic from PTX, resources and the executed path from SASS."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[a-z0-9_:]+)*?(?:\.v(\d+))?\.[a-z]+(\d+)\s")
_ASSIGNMENT = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.]*)\s+(%\w+|\{[^}]*\})\s*,\s*(.*);")
_REGISTER = re.compile(r"%\w+")
_BLOCK_END = re.compile(r"^\s*(?:\$L__BB\w+:|(?:@!?%\w+\s+)?bra\b|ret;)")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
"""A line of SASS: address, predicate if there is one, opcode, operands."""

_RESOURCES = re.compile(r"(REG|STACK|LOCAL|SHARED):(\d+)")


@dataclass(frozen=True)
class Access:
    """One load or store instruction of global memory; ``table_entry``: the one its address comes from."""

    store: bool
    bytes: int
    table_entry: str | None


def _blocks(ptx: str) -> Iterator[list[str]]:
    block: list[str] = []
    for line in ptx.splitlines():
        if _BLOCK_END.match(line):
            yield block
            block = []
        else:
            block.append(line)
    yield block


def _table_entries(ptx: str) -> Callable[[str], str | None]:
    """Finds the 64-bit word loaded from memory that an address register was computed from."""
    sources: dict[str, set[str]] = {}
    loaded = set[str]()
    for assignment in filter(None, map(_ASSIGNMENT.match, ptx.splitlines())):
        for target in _REGISTER.findall(assignment[2]):
            if assignment[1].startswith("ld.global"):
                loaded |= {target} if assignment[1].endswith(".b64") else set()
            elif assignment[1] != "mov.u64" or "%" in assignment[3]:
                sources.setdefault(target, set()).update(_REGISTER.findall(assignment[3]))

    def find(register: str) -> str | None:
        pending, seen = [register], set[str]()
        while pending:
            current = pending.pop()
            if current in loaded:
                return current
            if current not in seen:
                seen.add(current)
                pending += sources.get(current, ())
        return None

    return find


def main_accesses(ptx: str) -> list[Access]:
    """Accesses of a full tile: of the basic block that moves most, among those that store if any do."""
    table_entry = _table_entries(ptx)
    accesses = [
        [
            Access(m[1] == "st", int(m[2] or 1) * int(m[3]) // 8, table_entry(address[1]))
            for line in block
            if (m := _ACCESS.search(line)) and (address := re.search(r"\[\s*(%\w+)", line))
        ]
        for block in _blocks(ptx)
    ]
    # A single store is a reduction's result.
    return max(accesses, key=lambda b: (sum(a.store for a in b) > 1, sum(a.bytes for a in b)))


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction; ``predicated`` ones may do nothing."""

    address: int
    predicated: bool
    opcode: str
    operands: str

    @property
    def width(self) -> int:
        """Bytes of global memory that it moves for a thread."""
        if not self.opcode.startswith(("LDG.", "STG.")):
            return 0
        width = re.search(r"\.(8|16|U8|U16|64|128|256)\b", self.opcode)
        return int(width[1].lstrip("U")) // 8 if width else 4

    @property
    def bytes(self) -> int:
        """Bytes of global memory that it surely moves."""
        return 0 if self.predicated else self.width

    def target(self, index_of: dict[int, int]) -> int:
        """The index of what a jump goes to; -1 if it is none, or leaves the kernel."""
        address = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return index_of.get(int(address[1], 16), -1) if address else -1

    def successors(self, index: int, index_of: dict[int, int]) -> list[int]:
        """Indices of what may follow, jumps back excepted; the one past the end stands for the exit."""
        end = len(index_of)
        if self.opcode.startswith("EXIT"):
            return [end, index + 1] if self.predicated else [end]
        if not self.opcode.startswith("BRA"):
            return [] if self.opcode.startswith("RET") else [index + 1]
        jump = self.target(index_of)
        conditional = self.predicated or re.match(r"(\.\w+)?\s*!?U?P\d", self.operands)
        return [i for i in (jump, *([index + 1] if conditional else [])) if i > index]


def instructions(sass: str) -> list[Instruction]:
    """The instructions of one kernel, its slow paths included, the padding at its end not."""
    found = [Instruction(int(m[1], 16), bool(m[2]), m[3], m[4]) for m in INSTRUCTION.finditer(sass)]
    while found and (found[-1].opcode == "NOP" or found[-1].opcode.startswith("BRA")):
        found.pop()
    return found


def _indices(code: list[Instruction]) -> dict[int, int]:
    return {instruction.address: i for i, instruction in enumerate(code)}


def executed_path(
    code: list[Instruction], first: int = 0, last: int | None = None, avoided: tuple[str, ...] = ()
) -> list[Instruction]:
    """The shortest of the paths that move most memory: a full tile without rare cases.

    Division and square root branch to a subroutine for denormals and overflow; the path goes past it.
    ``first`` and ``last``: where it begins and, if not at the exit, ends. It goes round opcodes that begin
    with one of ``avoided``, however far.
    """
    index_of = _indices(code)
    end = len(code) if last is None else last
    best: dict[int, tuple[int, int]] = {end: (0, 0)}
    following = dict[int, int]()
    for i in range(end - 1, first - 1, -1):
        reachable = [(best[j], j) for j in code[i].successors(i, index_of) if j in best]
        if reachable:
            (moved, minus_length), following[i] = max(reachable)
            length = len(code) if code[i].opcode.startswith(avoided) else 1
            best[i] = moved + code[i].bytes, minus_length - length
    path, i = [], first
    while i < end:
        path.append(code[i])
        i = following[i]
    return path


def main_loop(code: list[Instruction]) -> tuple[int, int]:
    """Indices of the first and last instruction of the loop that moves most memory."""
    index_of = _indices(code)
    loops = [(target, i) for i, jump in enumerate(code) if 0 <= (target := jump.target(index_of)) < i]
    return max(loops, key=lambda loop: sum(code[i].bytes for i in range(*loop)))


def executed_per_tile(code: list[Instruction], tiles: int, avoided: tuple[str, ...] = ()) -> float:
    """Instructions of a program that works on so many tiles in its main loop, for each of them."""
    first, last = main_loop(code)
    body = len(executed_path(code, first, last, avoided)) + 1
    # Past the loop the shortest way leads out, as nothing is left.
    index_of = _indices(code)
    shortest = {len(code): 0}
    for i in range(len(code) - 1, last, -1):
        ways = [shortest[j] for j in code[i].successors(i, index_of) if j in shortest]
        shortest |= {i: 1 + min(ways)} if ways else {}
    return body + (len(executed_path(code, 0, first)) + shortest[last + 1]) / tiles


def resources(usage: str) -> dict[str, int]:
    """REG, STACK, LOCAL and SHARED of a kernel in what ``cuobjdump -res-usage`` prints."""
    return {name: int(value) for name, value in _RESOURCES.findall(usage)}


def disassemble(cubin: bytes, cuobjdump: str) -> tuple[str, dict[str, int]]:
    """SASS text and resource usage (REG, STACK, LOCAL, SHARED) of a cubin with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dump(option: str) -> str:
            command = [cuobjdump, option, str(path)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        return dump("-sass"), resources(dump("-res-usage"))
