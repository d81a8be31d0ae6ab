"""The instructions of one compiled kernel, and where its branches lead."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from .machine_operands import Code, UnknownCodeError

JUMPS = ("BRX", "BRXU", "RET")
"""To an address in a register."""


class Kernel:
    """A kernel's instructions, and where they lead."""

    def __init__(self, name: str, code: Sequence[Code]) -> None:
        self.name, self.code = name, code
        self.index_of = {one.address: i for i, one in enumerate(code)}
        self._shorter = dict[int, int]()

    def error(self, one: Code, reason: str) -> UnknownCodeError:
        """Says where it is that a kernel cannot be followed."""
        return UnknownCodeError(f"{self.name} at {one.address:#x}: {one.opcode}{one.text}: {reason}")

    def _distances(self, first: int, branch: int) -> dict[int, int]:
        """Instructions from one to others, not by the branch; a call costs more than any way round."""
        found, pending = dict[int, int](), [(0, first)]
        while pending:
            far, i = heapq.heappop(pending)
            if i in found or i in (branch, len(self.code)):
                continue
            one, found[i] = self.code[i], far
            reached = [i + 1]
            if one.base in ("EXIT", *JUMPS) and one.guard is None:
                reached = []
            if one.base == "BRA":
                always = one.guard is None and len(one.operands) == 1
                reached = [self.index_of[one.target]] + ([] if always else [i + 1])
            cost = far + (len(self.code) if one.base == "CALL" else 1)
            for j in reached:
                heapq.heappush(pending, (cost, j))
        return found

    def shorter(self, branch: int) -> int:
        """Where the shorter way to the place begins at which the two ways of a branch meet.

        Raises:
            UnknownCodeError: one of them moves elements or chooses a codec.
        """
        if branch not in self._shorter:
            ways = [self.index_of[self.code[branch].target], branch + 1]
            distances = [self._distances(way, branch) for way in ways]
            both = distances[0].keys() & distances[1].keys()
            if not both:
                raise self.error(self.code[branch], "the ways of an unknown branch do not meet")
            meet = min(both, key=lambda i: (distances[0][i] + distances[1][i], i))
            for distance in distances:
                before = [self.code[i] for i, far in distance.items() if far < distance[meet]]
                if any(one.streams or one.base in ("BRX", "BRXU") for one in before):
                    raise self.error(self.code[branch], "elements or codecs depend on an unknown branch")
            self._shorter[branch] = min(zip(distances, ways, strict=True), key=lambda way: way[0][meet])[1]
        return self._shorter[branch]
