"""What the Triton kernels cost, counted from compiled code on a machine without a GPU.

``python -m bench static [--out FILE]`` compiles every rule with the main storages for sm_80, sm_90 and
sm_100 in both arithmetics and reports bytes, registers and instructions per element.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.spec import bytes_moved
from fused_optim.kernels.triton.budget import LANE_INSTRUCTIONS_PER_BYTE, auto_exact, launch_shape

from .machine_code import disassemble, executed_path, instructions, main_accesses

CAPABILITIES = (80, 90, 100)
STORAGES = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "fp32", "bf16"),
    ("bf16", "bf16", "bf16"),
    ("fp16", "fp32", "fp16"),
    ("fp16", "fp16", "fp16"),
    ("fp32", "bf16", "fp32"),
    ("fp32", "fp32", "bf16"),
)
"""(parameter, every state, gradient): what people train with."""

FLOATS = tuple(name for name, codec in CODECS.items() if codec.compute == "float32")

_TYPES = {"tiles": "*i32", "table": "*i64", "rows": "*fp32", "layouts": "*i64", "partials": "*fp64"}


class Job(NamedTuple):
    """One kernel to compile; ``rule`` is None for the sum of squares."""

    rule: str | None
    codecs: tuple[str, ...]
    exact: bool
    strided: bool
    capability: int


@dataclass(frozen=True)
class Report:
    """Counts for one kernel; per element on the path of a full tile, ``emitted`` over the whole kernel."""

    kernel: str
    storage: str
    strided: bool
    arithmetic: str
    sm: int
    read: float
    written: float
    model: tuple[float, float]
    access: tuple[int, ...]
    registers: int
    spilled: int
    shared: int
    contracted: int
    approximate: int
    emitted: float
    executed: float
    budget: float
    auto: str

    @property
    def share(self) -> float:
        """Part of the instruction budget that is used."""
        return self.executed / self.budget


def step_jobs(
    rules: Iterable[str], storages: Iterable[tuple[str, str, str]], exact: Iterable[bool], sm: Iterable[int]
) -> list[Job]:
    """The product of the arguments; storages that differ only in the states of a rule without any are one."""
    jobs = itertools.product(rules, storages, exact, sm)
    return list(
        dict.fromkeys(
            Job(rule, (p, *(s,) * len(RULES[rule].slots), g), exact, False, sm)
            for rule, (p, s, g), exact, sm in jobs
        )
    )


def main_jobs(sm: Iterable[int] = CAPABILITIES, rules: Iterable[str] = tuple(RULES)) -> list[Job]:
    """Every rule with the main storages in both arithmetics, one of them strided; sums of squares."""
    sm = tuple(sm)
    jobs = step_jobs(rules, STORAGES, (True, False), sm)
    jobs += [job._replace(strided=True) for job in step_jobs(rules, STORAGES[1:2], (True,), sm)]
    return jobs + [Job(None, (name,), True, False, capability) for name in FLOATS for capability in sm]


def every_job(sm: Iterable[int], rules: Iterable[str]) -> list[Job]:
    """Every storage of parameter, gradient and each state."""
    return [
        Job(rule, storage, exact, False, capability)
        for rule in rules
        for storage in itertools.product(FLOATS, repeat=2 + len(RULES[rule].slots))
        for exact in (True, False)
        for capability in sm
    ]


def quick_jobs() -> list[Job]:
    """What the tests compile: everything in fp32 or bf16 for sm_90, a mixture for all, one strided kernel."""
    jobs = step_jobs(RULES, STORAGES[:3:2], (True, False), (90,))
    jobs += step_jobs(("adam", "lion"), STORAGES[1:2], (True,), CAPABILITIES)
    jobs += [Job("adam", ("bf16", "fp32", "fp32", "bf16"), True, True, 90)]
    return jobs + [Job(None, (name,), True, False, 90) for name in FLOATS]


def compile_kernel(job: Job) -> Any:
    """The compiled kernel, exactly as the driver would launch it."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fused_optim.kernels.triton import driver, step

    codecs = [CODECS[name] for name in job.codecs]
    if job.rule is None:
        kernel = step.square_sum
        constants, options = driver.square_sum_constants(codecs[0], job.strided)
    else:
        kernel = step.step
        constants, options = driver.step_constants(RULES[job.rule], codecs, job.strided, job.exact)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _TYPES.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs, {})
    return compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)


def report(job: Job) -> Report:
    """Compiles a kernel and counts."""
    import triton

    compiled = compile_kernel(job)
    sass, usage = disassemble(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    ptx, code = compiled.asm["ptx"], instructions(sass)
    accesses = main_accesses(ptx)
    codecs = [CODECS[name] for name in job.codecs]
    shape = launch_shape(codecs)
    threads = 32 * shape.warps
    elements = (shape.chunk if job.strided else shape.tile) / threads
    if job.rule is None:
        model, auto = (codecs[0].bytes_per_value, 0.0), "exact"
    else:
        param, *states, grad = codecs
        model = bytes_moved(RULES[job.rule], param, grad, tuple(states))
        auto = "exact" if auto_exact(RULES[job.rule], param, grad, tuple(states)) else "fast"
    return Report(
        kernel=job.rule or "square_sum",
        storage="/".join(job.codecs),
        strided=job.strided,
        arithmetic="exact" if job.exact else "fast",
        sm=job.capability,
        read=sum(access.bytes for access in accesses if not access.store) / elements,
        written=sum(access.bytes for access in accesses if access.store) / elements,
        model=model,
        access=tuple(sorted({access.bytes for access in accesses})),
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        contracted=len(re.findall(r"\bfma\.", ptx)),
        approximate=len(re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)", ptx)),
        emitted=len(code) / elements,
        executed=len(executed_path(code)) / elements,
        budget=LANE_INSTRUCTIONS_PER_BYTE * sum(model),
        auto=auto,
    )


def run(jobs: list[Job], workers: int | None = None) -> list[Report]:
    """Reports in the order of the jobs, compiled by several processes."""
    workers = workers or len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(report, jobs, chunksize=1)


def table(reports: Iterable[Report]) -> str:
    """One line a kernel."""
    lines = [
        "kernel        parameter/states/gradient    arithmetic  sm  read  written  access"
        "  registers  emitted  executed   budget  used  auto"
    ]
    for r in reports:
        storage = r.storage + (" strided" if r.strided else "")
        access = ",".join(map(str, r.access))
        lines.append(
            f"{r.kernel:<14}{storage:<29}{r.arithmetic:<10}{r.sm:>4}{r.read:>6.1f}{r.written:>9.1f}{access:>8}"
            f"{r.registers:>11}{r.emitted:>9.1f}{r.executed:>10.1f}{r.budget:>9.1f}{r.share:>6.0%}  {r.auto}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench static", description=__doc__)
    parser.add_argument("--out", type=Path, help="write every count as JSON to this file")
    parser.add_argument("--sm", type=int, nargs="+", default=CAPABILITIES, help="compute capabilities")
    parser.add_argument("--rule", nargs="+", default=tuple(RULES), choices=RULES, help="only these rules")
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument("--quick", action="store_true", help="just what the tests compile")
    selection.add_argument("--every", action="store_true", help="every storage of every tensor (hours)")
    parser.add_argument("--workers", type=int, help="compiling processes (default: one a core)")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: nothing would be compiled. Unset it")
    try:
        import triton
    except ImportError as error:
        parser.error(f"Triton cannot be imported ({error}): pip install 'triton>=3.6'")
    jobs = every_job(options.sm, options.rule) if options.every else main_jobs(options.sm, options.rule)
    reports = run(quick_jobs() if options.quick else jobs, options.workers)
    print(table(reports))
    if options.out:
        kernels = [asdict(r) | {"share": r.share} for r in reports]
        options.out.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
