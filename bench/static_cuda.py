"""What the CUDA C++ kernels take, read from the built library on a machine without a GPU.

``python -m bench static_cuda [--out FILE]`` reports registers, spilled bytes, shared memory, instructions
and the widths of accesses of every kernel in ``libfused_optim_cuda.so``, by capability. Of launches with the
codecs that people train with it reports bytes and instructions per element, the share of the issue budget and
what bounds the time. The status is 1 if a kernel spills or a launch moves other bytes than its codecs' model.

One kernel has the code of every codec and learns from the launch which of it to run: cuda_paths.py follows
its branches with a launch's values. The path of fp32 planes in ``step`` can be told from the code alone: that
of the widest accesses without conversions.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.native import library
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.spec import bytes_moved
from fused_optim.kernels.triton.budget import instructions_per_byte

from . import cuda_paths
from .compiled import NOTE, bound
from .cuda_launches import constants
from .cuda_paths import Function, LaunchReport, Unit
from .machine_code import Instruction, executed_path, executed_per_tile, instructions, main_loop, resources
from .record import add_out, begin, save
from .tables import Table, show

_CSRC = Path(__file__).resolve().parents[1] / "csrc"
_LISTED = re.compile(
    r"^arch = sm_(?P<sm>\d+)"
    r"|^ptxasOptions =(?P<options>.*)"
    r"|^ Function (?P<function>\S+):\n\s*(?P<resources>REG:.*)",
    re.MULTILINE,
)
_KERNEL = re.compile(r"\d([a-z][a-z_]*)_kernel(?:INS_\d+(\w+?)EE)?")
_COMPILER = re.compile(rb"Cuda compilation tools, (release [\w., ]+)")

_ELEMENTS, _ROUNDS = 8, 4
"""Of a thread in a round, and rounds of a block: ``csrc/registers.cuh``."""

_CONVERSIONS = ("F2F", "HADD2.F32")
"""From and to bf16 and fp16: F2FP, F2F. To bf16 they are as few as the moves of what stays fp32."""


class MissingToolError(Exception):
    """What has to be there to read compiled CUDA code, and how to get it."""


class Usage(NamedTuple):
    """What ptxas gave to a kernel of one translation unit for one capability."""

    function: str
    sm: int
    exact: bool
    resources: Mapping[str, int]


class PerElement(NamedTuple):
    """What one element takes where all planes are fp32: bytes and executed instructions."""

    read: float
    written: float
    executed: float


@dataclass(frozen=True)
class Report:
    """One kernel; ``rule`` is None for the sum of squares, ``emitted`` counts slow paths as well.

    ``access``: bytes of every width at which a thread moves elements, for any codec, the narrow ones of tails
    included. Elements, and nothing else, are moved by streaming accesses.
    """

    kernel: str
    rule: str | None
    arithmetic: str
    sm: int
    registers: int
    spilled: int
    shared: int
    emitted: int
    access: tuple[int, ...] = ()
    read: float | None = None
    written: float | None = None
    executed: float | None = None
    budget: float | None = None

    @property
    def used(self) -> float | None:
        """Part of the instruction budget, for fp32 planes."""
        return None if self.executed is None or self.budget is None else self.executed / self.budget

    @property
    def bound(self) -> str | None:
        """What sets the time at best."""
        return None if self.used is None else bound(self.used)

    @property
    def fault(self) -> str | None:
        """What no kernel may do, if this one does."""
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.rule is None or self.read is None or self.written is None:
            return None
        model = _model(self.rule)
        if all(map(math.isclose, (self.read, self.written), model)):
            return None
        return f"moves {self.read:g} + {self.written:g} bytes, not {model[0]:g} + {model[1]:g}"


def _model(rule: str) -> tuple[float, float]:
    """Bytes that a rule must read and write per element if all planes are fp32."""
    fp32 = CODECS["fp32"]
    return bytes_moved(RULES[rule], fp32, fp32, (fp32,) * len(RULES[rule].slots))


def cuobjdump() -> str:
    """The program that reads compiled CUDA code: the toolkit's, or the one of Triton's wheel.

    Raises:
        MissingToolError: there is none.
    """
    found = shutil.which("cuobjdump")
    if found is not None:
        return found
    try:
        own = Path(importlib.import_module("triton").__file__ or "").parent / "backends/nvidia/bin/cuobjdump"
        if own.exists():
            return str(own)
    except ImportError:
        pass
    raise MissingToolError("there is no cuobjdump: install the CUDA toolkit, or pip install triton")


def built() -> Path:
    """The library of the CUDA kernels.

    Raises:
        MissingToolError: it was not built.
    """
    found = library.path("cuda")
    if found is None:
        raise MissingToolError(str(library.load("cuda")))
    return found


def dump(tool: str, file: Path, *options: str) -> str:
    """What cuobjdump prints.

    Raises:
        MissingToolError: it cannot read the file.
    """
    done = subprocess.run([tool, *options, str(file)], capture_output=True, text=True)
    if done.returncode:
        raise MissingToolError(f"{tool} cannot read {file}: {done.stderr.strip()[:300]}")
    return done.stdout


def compiler(content: bytes) -> str | None:
    """The release of CUDA that made the machine code of a library; None if it does not say."""
    found = _COMPILER.search(content)
    return found[1].decode() if found else None


def usages(listing: str) -> Iterator[Usage]:
    """Every kernel in what ``cuobjdump -res-usage`` prints: each unit's PTX, then its machine code."""
    sm, exact = 0, False
    for found in _LISTED.finditer(listing):
        if found["sm"]:
            sm = int(found["sm"])
        elif found["options"] is not None:
            exact = "fmad false" in found["options"]
        else:
            yield Usage(found["function"], sm, exact, resources(found["resources"]))


@cache
def machine_code(tool: str, file: Path, sm: int) -> dict[str, str]:
    """By function, what ``cuobjdump -sass`` prints for one capability."""
    sass = dump(tool, file, "-sass", "-arch", f"sm_{sm}")
    functions = (text.partition("\n") for text in re.split(r"\n\s*Function : ", sass)[1:])
    return {name.strip(): code for name, _, code in functions}


def unit(tool: str, file: Path, sm: int) -> Unit:
    """The kernels of the library for one capability, to be followed.

    Raises:
        MissingToolError: the library cannot be opened, and so does not say how it numbers codecs.
    """
    functions = dict[Function, str]()
    for usage in usages(dump(tool, file, "-res-usage")):
        name = _KERNEL.search(usage.function)
        if usage.sm == sm and name:
            functions[name[1], name[2], usage.exact] = usage.function
    try:
        numbers = library.Library("cuda", ctypes.CDLL(str(file))).codecs
    except (OSError, AttributeError) as error:
        raise MissingToolError(f"{file} cannot be opened: {error}") from error
    return Unit(sm, functions, machine_code(tool, file, sm), constants(tool, file, sm), numbers)


def _access(code: Iterable[Instruction]) -> tuple[int, ...]:
    return tuple(sorted({i.width for i in code if i.width and ".EF" in i.opcode}))


def per_element(code: list[Instruction]) -> PerElement:
    """Counts of ``step`` for whole tiles of fp32 planes."""
    path = executed_path(code, *main_loop(code), _CONVERSIONS)
    moved = [sum(i.bytes for i in path if i.opcode.startswith(name)) for name in ("LDG", "STG")]
    executed = executed_per_tile(code, _ROUNDS, _CONVERSIONS)
    return PerElement(*(count / _ELEMENTS for count in (*moved, executed)))


def reports(tool: str, file: Path, capabilities: Iterable[int] | None) -> list[Report]:
    """Every kernel of the library for these capabilities, or for all that it has.

    Raises:
        MissingToolError: the library has no code for one of them, or cannot be read.
    """
    found, result = list(usages(dump(tool, file, "-res-usage"))), list[Report]()
    there = sorted({usage.sm for usage in found})
    if not there:
        raise MissingToolError(f"{file} has no machine code of a GPU")
    for sm in there if capabilities is None else capabilities:
        if sm not in there:
            listed = ", ".join(f"sm_{sm}" for sm in there)
            raise MissingToolError(f"{file} has no code for sm_{sm}, only for {listed}")
        own = [usage for usage in found if usage.sm == sm]
        code = {name: instructions(sass) for name, sass in machine_code(tool, file, sm).items()}
        for function, _, exact, taken in own:
            name = _KERNEL.search(function)
            kernel, rule = name.groups() if name else (function, None)
            counted = dict[str, float]()
            if kernel == "step" and rule is not None:
                counted = per_element(code[function])._asdict()
                counted["budget"] = instructions_per_byte(sm) * sum(_model(rule))
            result.append(
                Report(
                    kernel=kernel,
                    rule=rule,
                    arithmetic="exact" if exact else "fast",
                    sm=sm,
                    registers=taken["REG"],
                    spilled=taken["STACK"] + taken["LOCAL"],
                    shared=taken["SHARED"],
                    emitted=len(code[function]),
                    access=_access(code[function]),
                    **counted,
                )
            )
    return sorted(result, key=lambda r: (r.sm, r.kernel, r.rule or "", r.arithmetic))


def launches(tool: str, file: Path, capabilities: Iterable[int]) -> tuple[list[LaunchReport], list[str]]:
    """What launches take for these capabilities, and what cannot be told."""
    found, faults = list[LaunchReport](), list[str]()
    for sm in capabilities:
        of_unit = cuda_paths.reports(unit(tool, file, sm), cuda_paths.cases())
        found += of_unit[0]
        faults += of_unit[1]
    return found, faults


def _cells(kernel: Mapping[str, Any]) -> list[str]:
    keys = ("kernel", "rule", "arithmetic", "sm", "registers", "spilled", "shared", "emitted")
    cells = ["" if kernel[key] is None else str(kernel[key]) for key in keys]
    # Earlier files have no more.
    cells.append(",".join(map(str, kernel.get("access", ()))))
    if kernel.get("executed") is None:
        return cells + [""] * 4
    moved, used = kernel["read"] + kernel["written"], kernel["executed"] / kernel["budget"]
    return [*cells, f"{moved:g}", f"{kernel['executed']:.1f}", f"{used:.0%}", kernel.get("bound", "")]


def table(kernels: Sequence[Mapping[str, Any]]) -> Table:
    """One line a kernel."""
    header = ["kernel", "rule", "arithmetic", "sm", "registers", "spilled bytes", "shared bytes"]
    header += ["instructions", "access", "fp32: bytes", "executed", "of the budget", "bound"]
    return Table(f"CUDA C++ kernels: {len(kernels)}", header, [_cells(kernel) for kernel in kernels])


def _stale(file: Path) -> list[str]:
    """Sources of the checkout that are younger than the library."""
    built_at = file.stat().st_mtime
    sources = (source for pattern in ("*.cu", "*.cuh", "*.h", "*.cmake") for source in _CSRC.glob(pattern))
    return sorted(source.name for source in sources if source.stat().st_mtime > built_at)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench static_cuda", description=__doc__)
    add_out(parser, "at the end")
    parser.add_argument("--sm", type=int, nargs="+", help="compute capabilities (default: all)")
    parser.add_argument("--library", type=Path, help="a libfused_optim_cuda.so (default: the installed one)")
    return parser


def main(argv: list[str]) -> int:
    """Command line."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        file = options.library or built()
        tool = cuobjdump()
        found = reports(tool, file, options.sm)
        followed, unknown = launches(tool, file, sorted({report.sm for report in found}))
    except MissingToolError as missing:
        parser.error(str(missing))
    kernels = [asdict(report) | {"used": report.used, "bound": report.bound} for report in found]
    paths = [asdict(report) | {"used": report.used, "bound": report.bound} for report in followed]
    show(table(kernels))
    show(cuda_paths.table(paths))
    stale = _stale(file)
    if stale:
        print(f"{file} is older than {', '.join(stale)} of csrc/: build it again with `pip install -e .`")
    content = file.read_bytes()
    built_from = {"library": hashlib.sha256(content).hexdigest()[:12], "compiler": compiler(content)}
    head = begin("static_cuda", argv, torch.device("cpu"))
    counted = {"stale": stale, "kernels": kernels, "launches": paths}
    save({**head, "note": NOTE, **built_from, **counted}, options.out)
    faults = [f"{r.kernel} {r.rule or ''} {r.arithmetic} sm_{r.sm} {r.fault}" for r in found if r.fault]
    faults += unknown
    print("\n".join(faults) or f"none of {len(found)} kernels spills")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
