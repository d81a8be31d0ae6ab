"""What the CUDA C++ kernels take, read from the built library on a machine without a GPU.

``python -m bench static_cuda [--out FILE]`` reports registers, spilled bytes, shared memory and instructions
of every kernel in ``libfused_optim_cuda.so``, by capability. The status is 1 if a kernel spills.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_optim.kernels.native import library

from .compiled import NOTE
from .machine_code import instructions, resources
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


class MissingToolError(Exception):
    """What has to be there to read compiled CUDA code, and how to get it."""


class Usage(NamedTuple):
    """What ptxas gave to a kernel of one translation unit for one capability."""

    function: str
    sm: int
    exact: bool
    resources: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """One kernel; ``rule`` is None for the sum of squares, ``emitted`` counts slow paths as well."""

    kernel: str
    rule: str | None
    arithmetic: str
    sm: int
    registers: int
    spilled: int
    shared: int
    emitted: int


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


def _emitted(sass: str) -> dict[str, int]:
    """Instructions by function in what ``cuobjdump -sass`` prints for one capability."""
    functions = (text.partition("\n") for text in re.split(r"\n\s*Function : ", sass)[1:])
    return {name.strip(): len(instructions(code)) for name, _, code in functions}


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
        emitted = _emitted(dump(tool, file, "-sass", "-arch", f"sm_{sm}"))
        for function, _, exact, taken in own:
            name = _KERNEL.search(function)
            kernel, rule = name.groups() if name else (function, None)
            result.append(
                Report(
                    kernel=kernel,
                    rule=rule,
                    arithmetic="exact" if exact else "fast",
                    sm=sm,
                    registers=taken["REG"],
                    spilled=taken["STACK"] + taken["LOCAL"],
                    shared=taken["SHARED"],
                    emitted=emitted[function],
                )
            )
    return sorted(result, key=lambda r: (r.sm, r.kernel, r.rule or "", r.arithmetic))


def table(kernels: Sequence[Mapping[str, Any]]) -> Table:
    """One line a kernel."""
    header = [
        "kernel",
        "rule",
        "arithmetic",
        "sm",
        "registers",
        "spilled bytes",
        "shared bytes",
        "instructions",
    ]
    keys = ("kernel", "rule", "arithmetic", "sm", "registers", "spilled", "shared", "emitted")
    lines = [["" if k[key] is None else str(k[key]) for key in keys] for k in kernels]
    return Table(f"CUDA C++ kernels: {len(kernels)}", header, lines)


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
        found = reports(cuobjdump(), file, options.sm)
    except MissingToolError as missing:
        parser.error(str(missing))
    kernels = [asdict(report) for report in found]
    show(table(kernels))
    stale = _stale(file)
    if stale:
        print(f"{file} is older than {', '.join(stale)} of csrc/: build it again with `pip install -e .`")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    head = begin("static_cuda", argv, torch.device("cpu"))
    save({**head, "note": NOTE, "library": digest, "stale": stale, "kernels": kernels}, options.out)
    spilling = [r for r in found if r.spilled]
    for r in spilling:
        print(f"{r.kernel} {r.rule or ''} {r.arithmetic} sm_{r.sm} spills {r.spilled} bytes")
    if not spilling:
        print(f"none of {len(found)} kernels spills")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
