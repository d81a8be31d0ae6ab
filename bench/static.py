"""What the Triton kernels cost, counted from compiled code on a machine without a GPU.

``python -m bench static [--out FILE]`` compiles every rule with the main storages for sm_80, sm_90 and
sm_100 in both arithmetics and reports bytes, registers and instructions per element.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fused_optim.kernels.codecs import CODECS, OF_DTYPE, PARAM_CODECS, STATE_CODECS, for_slot
from fused_optim.kernels.masking import GROUPS, masked
from fused_optim.kernels.rules import CAST_ADAM, RULES
from fused_optim.kernels.spec import Codec, Rule, Slot, bytes_moved
from fused_optim.kernels.triton.budget import LANE_INSTRUCTIONS_PER_BYTE, auto_exact, launch_shape

from .compiled import CAPABILITIES, check_triton, command_line, run, write
from .machine_code import Access, disassemble, executed_path, instructions, main_accesses

PLAIN = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "fp32", "bf16"),
    ("bf16", "bf16", "bf16"),
    ("fp16", "fp32", "fp16"),
    ("fp16", "fp16", "fp16"),
    ("fp32", "bf16", "fp32"),
    ("fp32", "fp32", "bf16"),
)
CODED = (
    ("fp32", "int8", "fp32"),
    ("fp32", "int8_companded", "fp32"),
    ("fp32", "fp8", "fp32"),
    ("fp32", "int4", "fp32"),
    ("bf16_split8", "int8_companded", "bf16"),
    ("bf16_split16", "bf16_sr", "bf16"),
    ("bf16_kahan", "bf16", "bf16"),
    ("fp16_kahan", "fp16", "fp16"),
    ("bf16_sr", "int4", "bf16"),
)
STORAGES = PLAIN + CODED
"""(parameter, every state, gradient): what people train with."""

IN_PLACE = ("fp32", "fp32", "fp32", "mask", "fp32")
MIXED = ("bf16", "fp32", "fp32", "mask", "bf16")
DENSE = ("bf16", "int8", "int8_unsigned", "mask", "bf16_split16", "bf16")
MASKED = (
    *(("adam", group, IN_PLACE) for group in (0, *GROUPS)),
    *(("cast_adam", group, IN_PLACE) for group in (0, 4)),
    ("adam", 4, MIXED),
    ("adam", 4, ("bf16", "fp32", "fp32", "mask", "fp32", "bf16")),
    ("adam", 4, DENSE),
    ("adam", 16, DENSE),
    ("adam", 4, ("bf16_sr", "int4", "int4_unsigned", "mask", "bf16")),
    ("sgd_momentum", 4, ("bf16", "bf16", "mask", "bf16_split8", "bf16")),
    ("lion", 4, ("bf16", "bf16", "mask", "bf16")),
    ("lion", 16, ("bf16", "bf16", "mask", "bf16")),
)
"""Rule, size of groups, codecs: parameter, states (the mask and dense weights last), gradient."""

FLOATS = tuple(name for name in OF_DTYPE.values() if CODECS[name].compute == "float32")
PARAMS = tuple(name for name in PARAM_CODECS if CODECS[name].compute == "float32")
STATES = tuple(name for name in STATE_CODECS if CODECS[name].compute == "float32")

_TYPES = {"tiles": "*i32", "table": "*i64", "rows": "*fp32", "layouts": "*i64", "partials": "*fp64"}


class Job(NamedTuple):
    """One kernel to compile; ``rule`` is None for the sum of squares, ``group`` for rules without a mask."""

    rule: str | None
    codecs: tuple[str, ...]
    exact: bool
    strided: bool
    capability: int
    group: int | None = None

    @property
    def whole_rule(self) -> Rule:
        """The rule with its mask."""
        assert self.rule is not None
        inner = CAST_ADAM if self.rule == CAST_ADAM.name else RULES[self.rule]
        if self.group is None:
            return inner
        return masked(inner, self.group, keeps_dense=self.codecs[-2] != "mask")


@dataclass(frozen=True)
class Report:
    """Counts for one kernel; per element on the path of a full tile, ``emitted`` over the whole kernel.

    A scale is read by all threads of its block and written by one of them: ``scales`` counts instructions.
    ``gathered`` ones look up a table, which stays in the cache and is no traffic.
    """

    kernel: str
    group: int | None
    storage: str
    strided: bool
    arithmetic: str
    sm: int
    read: float
    written: float
    scales: float
    gathered: float
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


def _variant(name: str, slot: Slot) -> str:
    return for_slot(name, slot.signed).name


def step_jobs(
    rules: Iterable[str], storages: Iterable[tuple[str, str, str]], exact: Iterable[bool], sm: Iterable[int]
) -> list[Job]:
    """The product of the arguments; storages that differ only in the states of a rule without any are one."""
    jobs = itertools.product(rules, storages, exact, sm)
    return list(
        dict.fromkeys(
            Job(rule, (p, *(_variant(s, slot) for slot in RULES[rule].slots), g), exact, False, sm)
            for rule, (p, s, g), exact, sm in jobs
        )
    )


def masked_jobs(
    kinds: Iterable[tuple[str, int, tuple[str, ...]]], exact: Iterable[bool], sm: Iterable[int]
) -> list[Job]:
    """The product of the arguments."""
    jobs = itertools.product(kinds, exact, sm)
    return [Job(rule, codecs, exact, False, sm, group) for (rule, group, codecs), exact, sm in jobs]


def main_jobs(sm: Iterable[int] = CAPABILITIES, rules: Iterable[str] = tuple(RULES)) -> list[Job]:
    """Every rule with the main storages in both arithmetics, one of them strided; sums of squares."""
    sm = tuple(sm)
    jobs = step_jobs(rules, STORAGES, (True, False), sm)
    jobs += [job._replace(strided=True) for job in step_jobs(rules, PLAIN[1:2], (True,), sm)]
    jobs += [job for job in masked_jobs(MASKED, (True, False), sm) if job.rule in {*rules, CAST_ADAM.name}]
    return jobs + [Job(None, (name,), True, False, capability) for name in FLOATS for capability in sm]


def every_job(sm: Iterable[int], rules: Iterable[str]) -> list[Job]:
    """Every storage of parameter, gradient and each state."""
    return [
        Job(rule, storage, exact, False, capability)
        for rule in rules
        for p, g, *states in itertools.product(PARAMS, FLOATS, *[STATES] * len(RULES[rule].slots))
        for storage in [(p, *map(_variant, states, RULES[rule].slots), g)]
        for exact in (True, False)
        for capability in sm
    ]


def quick_jobs() -> list[Job]:
    """What the tests compile: everything in fp32 or bf16 for sm_90, a mixture for all, one strided kernel."""
    jobs = step_jobs(RULES, PLAIN[:3:2], (True, False), (90,))
    jobs += step_jobs(("adam", "lion"), PLAIN[1:2], (True,), CAPABILITIES)
    jobs += [Job("adam", ("bf16", "fp32", "fp32", "bf16"), True, True, 90)]
    jobs += step_jobs(("adam",), (*CODED[:4], CODED[-1]), (False,), (90,))
    jobs += step_jobs(("adam",), CODED[1:2], (True,), (90,))
    jobs += step_jobs(("sgd_momentum",), CODED[4:-1], (False,), (90,))
    # The first half of a step that is cut by whole matrices; the second one is sgd's.
    halves = [("blank", "fp32", "fp32"), ("blank", "int8", "bf16")]
    jobs += step_jobs(("adam", "lion"), halves, (True,), (90,))
    # Twins of kernels above, the dearest mask, CAST, dense weights.
    jobs += masked_jobs([("adam", 4, IN_PLACE)], (True, False), (90,))
    jobs += masked_jobs([("adam", 4, MIXED)], (True,), (80, 100))
    jobs += masked_jobs([("adam", 16, IN_PLACE), ("cast_adam", 4, IN_PLACE)], (True,), (90,))
    jobs += masked_jobs([("adam", 4, DENSE)], (False,), (90,))
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
        constants, options = driver.step_constants(job.whole_rule, codecs, job.strided, job.exact)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _TYPES.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs, {})
    return compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)


def _traffic(
    accesses: list[Access], codecs: list[Codec], elements: float, vector: int, strided: bool
) -> tuple[float, float, float, float, tuple[int, ...]]:
    """Bytes read and written, instructions for scales and lookups, each per element; widths of the others."""
    bytes_of, scales, gathered, widths = [0.0, 0.0], 0, 0, set[int]()
    # Addresses are loaded in the order of the table, and registers numbered in the order of the loads.
    entries = sorted({a.table_entry or "" for a in accesses}, key=lambda name: (len(name), name))
    homes = [(c, plane) for c in codecs for plane in (*c.planes, *[None] * (c.lookup is not None))]
    assert strided or len(entries) == len(homes), (entries, homes)
    for access in accesses:
        codec, plane = codecs[0], None if not strided else codecs[0].planes[0]
        if not strided:
            codec, plane = homes[entries.index(access.table_entry or "")]
        if plane is None:
            gathered += 1
        elif codec.block > 1 and plane.per == codec.block:
            scales += 1
        else:
            # Threads whose neighbours share a byte of a mask read it at once, and one of them writes it.
            bytes_of[access.store] += access.bytes / max(1, plane.per // vector)
            widths.add(access.bytes)
    per_scale = sum(p.bits / 8 / p.per for c in codecs for p in c.planes if c.block > 1 and p.per == c.block)
    read, written = (total / elements + per_scale for total in bytes_of)
    return read, written, scales / elements, gathered / elements, tuple(sorted(widths))


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
    read, written, scales, gathered, widths = _traffic(accesses, codecs, elements, shape.vector, job.strided)
    if job.rule is None:
        model, auto = (codecs[0].bytes_per_value, 0.0), "exact"
    else:
        param, *states, grad = codecs
        model = bytes_moved(job.whole_rule, param, grad, tuple(states))
        auto = "exact" if auto_exact(job.whole_rule, param, grad, tuple(states)) else "fast"
    return Report(
        kernel=job.rule or "square_sum",
        group=job.group,
        storage="/".join(job.codecs),
        strided=job.strided,
        arithmetic="exact" if job.exact else "fast",
        sm=job.capability,
        read=read,
        written=written,
        scales=scales,
        gathered=gathered,
        model=model,
        access=widths,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        # Those with .ftz are the codecs' own, which correct an approximation (arithmetic.py).
        contracted=len(re.findall(r"\bfma\.rn\.f32", ptx)),
        approximate=len(re.findall(r"\b(?:(?:div|rcp|rsqrt)\.(?:approx|full)\.f32|sqrt\.approx)", ptx)),
        emitted=len(code) / elements,
        executed=len(executed_path(code)) / elements,
        budget=LANE_INSTRUCTIONS_PER_BYTE * sum(model),
        auto=auto,
    )


def table(reports: Iterable[Report]) -> str:
    """One line a kernel."""
    lines = [
        f"{'kernel':<16}{'parameter/states/gradient':<53}arithmetic  sm  read  written  access"
        "  registers  emitted  executed   budget  used  auto"
    ]
    for r in reports:
        kernel = r.kernel + ("" if r.group is None else f" of {r.group}")
        storage = r.storage + (" strided" if r.strided else "")
        access = ",".join(map(str, r.access))
        lines.append(
            f"{kernel:<16}{storage:<53}{r.arithmetic:<10}{r.sm:>4}{r.read:>6.1f}{r.written:>9.1f}{access:>8}"
            f"{r.registers:>11}{r.emitted:>9.1f}{r.executed:>10.1f}{r.budget:>9.1f}{r.share:>6.0%}  {r.auto}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Command line."""
    parser = command_line("static", __doc__)
    parser.add_argument("--rule", nargs="+", default=tuple(RULES), choices=RULES, help="only these rules")
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument("--quick", action="store_true", help="just what the tests compile")
    selection.add_argument("--every", action="store_true", help="every storage of every tensor (hours)")
    options = parser.parse_args(argv)
    check_triton(parser)
    jobs = every_job(options.sm, options.rule) if options.every else main_jobs(options.sm, options.rule)
    reports = run(report, quick_jobs() if options.quick else jobs, options.workers)
    print(table(reports))
    write("static", argv, options, [asdict(r) | {"share": r.share} for r in reports])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
