"""What a launch of a CUDA C++ kernel executes and moves, by its rule and its codecs.

A kernel has the code of every codec, so its machine code is followed with the values that a launch has
(machine_follow.py). What a block does with a whole, dense, aligned tile is divided by its elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.spec import Codec, Rule, bytes_moved
from fused_optim.kernels.triton.budget import instructions_per_byte

from .compiled import bound
from .cuda_launches import ELEMENTS, Constants, Launch
from .machine_follow import Block, Way
from .machine_kernel import Kernel
from .machine_operands import UnknownCodeError, decoded
from .machine_words import THREADS
from .static import masked_jobs, step_jobs
from .static_cases import FLOATS, MASKED
from .tables import Table

STORAGES = (
    *(("fp32", name, "fp32") for name in ("fp32", "int8", "int8_companded", "fp8", "int4")),
    *(("bf16", name, "bf16") for name in ("bf16", "int8")),
    *((name, "bf16", "bf16") for name in ("bf16_sr", "bf16_kahan")),
    *(("bf16_split8", name, "bf16") for name in ("int8", "int8_companded", "int4")),
)
"""(parameter, every state, gradient): plain, with narrow states, and what is recommended."""

Function = tuple[str, str | None, bool]
"""Kernel, rule and exactness."""


@dataclass(frozen=True)
class Case:
    """A rule with the codecs of its parameter, its gradient and its states."""

    rule: Rule
    codecs: tuple[Codec, ...]

    @property
    def kernel(self) -> str:
        """The kernel that a launch with these codecs takes."""
        if self.rule.inner is not None:
            return "step_masked"
        return "step" if all(codec.name in FLOATS for codec in self.codecs) else "step_coded"

    @property
    def name(self) -> str:
        """Of the rule without its mask."""
        return (self.rule.inner or self.rule).name

    @property
    def storage(self) -> str:
        """As ``python -m bench static`` writes it: parameter, states, gradient."""
        param, grad, *states = self.codecs
        return "/".join(codec.name for codec in (param, *states, grad))

    @property
    def model(self) -> tuple[float, float]:
        """Bytes that must be read and written per element."""
        param, grad, *states = self.codecs
        return bytes_moved(self.rule, param, grad, tuple(states))


@dataclass(frozen=True)
class LaunchReport:
    """What one element takes in a launch: bytes, issued instructions, and how wide its accesses are."""

    kernel: str
    rule: str
    group: int | None
    storage: str
    arithmetic: str
    sm: int
    read: float
    written: float
    executed: float
    budget: float
    access: tuple[int, ...]

    @property
    def used(self) -> float:
        """Part of the instruction budget."""
        return self.executed / self.budget

    @property
    def bound(self) -> str:
        """What sets the time at best."""
        return bound(self.used)


def cases() -> list[Case]:
    """Every rule with every storage, then those with masks."""
    jobs = step_jobs(RULES, STORAGES, (True,), (90,)) + masked_jobs(MASKED, (True,), (90,))
    found = list[Case]()
    for job in jobs:
        param, *states, grad = (CODECS[name] for name in job.codecs)
        found.append(Case(job.whole_rule, (param, grad, *states)))
    return found


class Unit:
    """The kernels of a library for one capability.

    ``sass`` is the machine code of every function, ``numbers`` what the library calls its codecs.
    """

    def __init__(
        self,
        sm: int,
        functions: Mapping[Function, str],
        sass: Mapping[str, str],
        banks: Mapping[str, Constants],
        numbers: Mapping[str, int],
    ) -> None:
        self.sm, self.functions, self._sass = sm, functions, sass
        self._banks, self._numbers = banks, numbers
        self._kernels = dict[str, Kernel]()

    def way(self, case: Case, exact: bool) -> Way:
        """What a block does.

        Raises:
            UnknownCodeError: it cannot be told from the code.
        """
        function = self.functions[case.kernel, case.name, exact]
        if function not in self._kernels:
            self._kernels[function] = Kernel(function, decoded(self._sass[function]))
        launch = Launch(case.rule, case.codecs, self._numbers, self._banks[function])
        return Block(self._kernels[function], launch).follow()

    def report(self, case: Case, exact: bool) -> LaunchReport:
        """The same for an element.

        Raises:
            UnknownCodeError: it cannot be told from the code, or other bytes are moved than must be.
        """
        way = self.way(case, exact)
        read, written = (
            sum(access.width for access in way.accesses if access.store == store) / ELEMENTS
            for store in (False, True)
        )
        arithmetic = "exact" if exact else "fast"
        if (read, written) != case.model:
            where = f"{case.kernel} {case.name} {arithmetic} sm_{self.sm} {case.storage}"
            model = "{:g} + {:g}".format(*case.model)
            raise UnknownCodeError(f"{where} moves {read:g} + {written:g} bytes, not {model}")
        return LaunchReport(
            kernel=case.kernel,
            rule=case.name,
            group=case.rule.group if case.rule.inner is not None else None,
            storage=case.storage,
            arithmetic=arithmetic,
            sm=self.sm,
            read=read,
            written=written,
            executed=way.per_thread * THREADS / ELEMENTS,
            budget=instructions_per_byte(self.sm) * (read + written),
            access=tuple(sorted({access.width for access in way.accesses})),
        )


def reports(unit: Unit, chosen: Iterable[Case]) -> tuple[list[LaunchReport], list[str]]:
    """Every case in both arithmetics; where one cannot be counted, what stands in the way."""
    found, faults = list[LaunchReport](), list[str]()
    for case, exact in product(chosen, (True, False)):
        if (case.kernel, case.name, exact) not in unit.functions:
            continue
        try:
            found.append(unit.report(case, exact))
        except UnknownCodeError as error:
            faults.append(f"{case.storage} sm_{unit.sm}: {error}")
    return found, faults


def _cells(launch: Mapping[str, Any]) -> list[str]:
    group = "" if launch["group"] is None else str(launch["group"])
    cells = [
        launch["kernel"],
        launch["rule"],
        group,
        launch["storage"],
        launch["arithmetic"],
        str(launch["sm"]),
    ]
    moved, used = launch["read"] + launch["written"], launch["executed"] / launch["budget"]
    return [
        *cells,
        ",".join(map(str, launch["access"])),
        f"{moved:.5g}",
        f"{launch['executed']:.1f}",
        f"{used:.0%}",
        launch["bound"],
    ]


def table(launches: Sequence[Mapping[str, Any]]) -> Table:
    """One line a launch."""
    header = ["kernel", "rule", "group", "storage", "arithmetic", "sm", "access", "bytes", "executed"]
    title = f"Launches of CUDA C++ kernels, per element: {len(launches)}"
    return Table(title, [*header, "of the budget", "bound"], [_cells(launch) for launch in launches])
