"""What the Triton kernels cost, counted from compiled code on a machine without a GPU.

``python -m bench static [--out FILE]`` compiles every rule with the main storages for sm_80, sm_90 and
sm_100 in both arithmetics and reports bytes, registers, spills and instructions per element, and what will
bound the time: memory, or instructions where they need more issue slots than an A100, H200 or B200 has while
it copies as many bytes (``kernels/triton/budget.py``). The status is 1 if a kernel spills, or moves other
bytes than its codecs' model says.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fused_optim.kernels.codecs import CODECS, for_slot
from fused_optim.kernels.masking import masked
from fused_optim.kernels.rules import CAST_ADAM, RULES
from fused_optim.kernels.spec import Codec, Rule, Slot, bytes_moved
from fused_optim.kernels.triton.budget import (
    TILES_OF_A_PROGRAM,
    auto_exact,
    instructions_per_byte,
    launch_shape,
)

from .compiled import CAPABILITIES, bound, check_triton, command_line, run, write
from .machine_code import Access, disassemble, executed_path, executed_per_tile, instructions, main_accesses
from .static_cases import (
    CODED,
    DENSE,
    FLOATS,
    IN_PLACE,
    MASKED,
    MIXED,
    PARAMS,
    PLAIN,
    RECOMMENDED,
    STATES,
    STORAGES,
)
from .static_masks import SEARCHES, model, search, traffic

_COMPILED = (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)  # what Triton and its ptxas know

_TYPES = {"tiles": "*i32", "table": "*i64", "rows": "*fp32", "layouts": "*i64", "partials": "*fp64"}


class Job(NamedTuple):
    """One kernel to compile; ``group`` is None for rules without a mask.

    ``rule`` is None for the sum of squares, and a search's name for the kernels that only find masks.
    """

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

    ``executed`` is that of a large launch, whose programs work on ``TILES_OF_A_PROGRAM`` tiles each.

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

    @property
    def bound(self) -> str:
        """What sets the time at best; between ``USABLE_SHARE`` and 1 stalled loads may."""
        return bound(self.share)

    @property
    def fault(self) -> str | None:
        """What no kernel may do, if this one does."""
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if not all(map(math.isclose, (self.read, self.written), self.model)):
            return f"moves {self.read:g} + {self.written:g} bytes, not {self.model[0]:g} + {self.model[1]:g}"
        return None


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


def search_jobs(sm: Iterable[int]) -> list[Job]:
    """The searches for masks of whole tensors, in fp32 and bf16."""
    kinds = [(name, group) for name, groups in SEARCHES.items() for group in groups]
    jobs = itertools.product(kinds, ("fp32", "bf16"), sm)
    return [Job(name, (codec, "mask"), True, False, sm, group) for (name, group), codec, sm in jobs]


def main_jobs(sm: Iterable[int] = CAPABILITIES, rules: Iterable[str] = tuple(RULES)) -> list[Job]:
    """Every rule with the main storages in both arithmetics, one of them strided; sums of squares."""
    sm = tuple(sm)
    jobs = step_jobs(rules, STORAGES, (True, False), sm)
    jobs += [job._replace(strided=True) for job in step_jobs(rules, PLAIN[1:2], (True,), sm)]
    jobs += [job for job in masked_jobs(MASKED, (True, False), sm) if job.rule in {*rules, CAST_ADAM.name}]
    jobs += search_jobs(sm)
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
    jobs += step_jobs(("adam",), (*CODED[:5], CODED[-1], *RECOMMENDED[:2]), (False,), (90,))
    jobs += step_jobs(("adam",), CODED[1:2], (True,), (90,))
    jobs += step_jobs(("sgd_momentum",), CODED[4:-1], (False,), (90,))
    # What ptxas spills of sm_100 if it is left alone.
    jobs += step_jobs(("adam",), CODED[3:4], (True,), (100,))
    jobs += step_jobs(("adam_amsgrad",), RECOMMENDED[2:], (False,), (100,))
    jobs += step_jobs(("sgd_momentum",), CODED[4:5], (False,), (100,))
    # The first half of a step that is cut by whole matrices; the second one is sgd's.
    halves = [("blank", "fp32", "fp32"), ("blank", "int8", "bf16")]
    jobs += step_jobs(("adam", "lion", "sgd_momentum"), halves, (True,), (90,))
    # Twins of kernels above, the dearest mask, CAST, dense weights.
    jobs += masked_jobs([("adam", 4, IN_PLACE)], (True, False), (90,))
    jobs += masked_jobs([("adam", 4, MIXED)], (True,), (80, 100))
    jobs += masked_jobs([("adam", 16, IN_PLACE), ("cast_adam", 4, IN_PLACE)], (True,), (90,))
    jobs += masked_jobs([("adam", 4, DENSE)], (False,), (90,))
    jobs += [job for job in search_jobs((90,)) if job.group in (4, None) and job.codecs[0] == "fp32"]
    return jobs + [Job(None, (name,), True, False, 90) for name in FLOATS]


def compile_kernel(job: Job) -> Any:
    """The compiled kernel, exactly as the driver would launch it."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fused_optim.kernels.triton import driver, step

    codecs = [CODECS[name] for name in job.codecs]
    options: dict[str, Any]
    if job.rule in SEARCHES:
        found = search(job.rule, job.codecs[0], job.group)
        kernel, constants = found.kernel, found.constants
        options = {"num_warps": found.warps, "enable_fp_fusion": False}
        types, aligned = found.signature, found.aligned
    elif job.rule is None:
        kernel, types, aligned = step.square_sum, _TYPES, ()
        constants, options = driver.square_sum_constants(codecs[0], job.strided)
    else:
        kernel, types, aligned = step.step, _TYPES, ()
        arguments = job.whole_rule, codecs, job.strided, job.exact, job.capability
        constants, options = driver.step_constants(*arguments)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs, attributes)
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


def _model(job: Job, codecs: list[Codec]) -> tuple[tuple[float, float], str]:
    """Bytes that must be read and written per element, and the arithmetic that ``auto`` means."""
    if job.rule is None:
        return (codecs[0].bytes_per_value, 0.0), "exact"
    param, *states, grad = codecs
    exact = auto_exact(job.whole_rule, param, grad, tuple(states))
    return bytes_moved(job.whole_rule, param, grad, tuple(states)), "exact" if exact else "fast"


def report(job: Job) -> Report:
    """Compiles a kernel and counts."""
    import triton

    compiled = compile_kernel(job)
    sass, usage = disassemble(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    ptx, code = compiled.asm["ptx"], instructions(sass)
    accesses = main_accesses(ptx)
    loops = job.rule in RULES.keys() | {CAST_ADAM.name} and not job.strided
    executed = executed_per_tile(code, TILES_OF_A_PROGRAM) if loops else len(executed_path(code))
    if job.rule in SEARCHES:
        found = search(job.rule, job.codecs[0], job.group)
        elements, moved, auto = found.elements, model(job.codecs[0]), "exact"
        read, written, widths = traffic(accesses, found)
        scales = gathered = 0.0
    else:
        codecs = [CODECS[name] for name in job.codecs]
        shape = launch_shape(codecs)
        elements = (shape.chunk if job.strided else shape.tile) / (32 * shape.warps)
        moved, auto = _model(job, codecs)
        read, written, scales, gathered, widths = _traffic(
            accesses, codecs, elements, shape.vector, job.strided
        )
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
        model=moved,
        access=widths,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        # Those with .ftz are the codecs' own, which correct an approximation (arithmetic.py).
        contracted=sum(2 if pair else 1 for pair in re.findall(r"\bfma\.rn\.f32(x2)?\b", ptx)),
        approximate=len(re.findall(r"\b(?:(?:div|rcp|rsqrt)\.(?:approx|full)\.f32|sqrt\.approx)", ptx)),
        emitted=len(code) / elements,
        executed=executed / elements,
        budget=instructions_per_byte(job.capability) * sum(moved),
        auto=auto,
    )


def _label(r: Report) -> tuple[str, str]:
    kernel = r.kernel + ("" if r.group is None else f" of {r.group}")
    return kernel, r.storage + (" strided" if r.strided else "")


def table(reports: Iterable[Report]) -> str:
    """One line a kernel."""
    lines = [
        f"{'kernel':<19}{'parameter/states/gradient':<53}arithmetic  sm  read  written  access"
        "  registers  spills  shared  emitted  executed   budget  used  bound         auto"
    ]
    for r in reports:
        kernel, storage = _label(r)
        access = ",".join(map(str, r.access))
        lines.append(
            f"{kernel:<19}{storage:<53}{r.arithmetic:<10}{r.sm:>4}{r.read:>6.1f}{r.written:>9.1f}{access:>8}"
            f"{r.registers:>11}{r.spilled:>8}{r.shared:>8}{r.emitted:>9.1f}{r.executed:>10.1f}{r.budget:>9.1f}"
            f"{r.share:>6.0%}  {r.bound:<12}  {r.auto}"
        )
    return "\n".join(lines)


def _storage(text: str) -> tuple[str, str, str]:
    """``PARAMETER/STATES``, with a gradient of the parameter's dtype, or ``PARAMETER/STATES/GRADIENT``."""
    param, states, *grad = text.split("/")
    if param not in PARAMS or states not in STATES or len(grad) > 1 or not {*grad} <= {*FLOATS}:
        raise argparse.ArgumentTypeError(
            f"{text!r}: PARAMETER/STATES or PARAMETER/STATES/GRADIENT, parameters {', '.join(PARAMS)}; "
            f"states {', '.join(STATES)}; gradients {', '.join(FLOATS)}"
        )
    return param, states, grad[0] if grad else param.split("_")[0]


def _chosen(options: argparse.Namespace) -> list[Job]:
    """The kernels that the command line asks for."""
    if options.quick:
        return quick_jobs()
    if options.every:
        return every_job(options.sm, options.rule)
    if options.storages:
        return step_jobs(options.rule, options.storages, (True, False), options.sm)
    return main_jobs(options.sm, options.rule)


def _parser() -> argparse.ArgumentParser:
    parser = command_line("static", __doc__)
    parser.add_argument("--rule", nargs="+", choices=RULES, help="only these rules (default: all)")
    # None: not given.
    parser.set_defaults(sm=None)
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument("--quick", action="store_true", help="just what the tests compile")
    selection.add_argument("--every", action="store_true", help="every storage of every tensor (hours)")
    named = "PARAMETER/STATES"
    selection.add_argument("--storages", nargs="+", type=_storage, metavar=named, help="or with /GRADIENT")
    return parser


def _options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, where nothing is ignored."""
    parser = _parser()
    options = parser.parse_args(argv)
    for name in ("sm", "rule"):
        if options.quick and getattr(options, name):
            parser.error(f"--{name} with --quick, which compiles a list of its own: leave one of them out")
    unknown = sorted({*(options.sm or ())} - {*_COMPILED})
    if unknown:
        parser.error(f"--sm {unknown[0]}: Triton compiles for {', '.join(map(str, _COMPILED))}")
    options.sm, options.rule = options.sm or CAPABILITIES, options.rule or tuple(RULES)
    check_triton(parser)
    return options


def main(argv: list[str]) -> int:
    """Command line."""
    options = _options(argv)
    reports = run(report, _chosen(options), options.workers)
    print(table(reports))
    write("static", argv, options, [asdict(r) | {"share": r.share, "bound": r.bound} for r in reports])
    faults = [" ".join((*_label(r), r.arithmetic, f"sm_{r.sm}", r.fault)) for r in reports if r.fault]
    print("\n".join(faults) or "no kernel spills, and each moves the bytes of its model")
    return 1 if faults else 0
