"""What the kernels of the matrix products cost, counted from compiled code on a machine without a GPU.

``python -m bench static_products [--out FILE]`` compiles them for sm_80, sm_90 and sm_100 as they would be
launched, and reports registers, shared memory, tensor-core instructions and the clocks of the main loop.
"""

from __future__ import annotations

import collections
import itertools
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fused_optim.kernels.triton import product_shapes
from fused_optim.kernels.triton.product_shapes import Shape

from .compiled import CAPABILITIES, check_triton, command_line, run, write
from .machine_code import Instruction, disassemble, instructions

BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Of which a program can have at most so many; the next KiB is the system's."""

_TENSOR = re.compile(r"HGMMA|HMMA|UTC\w*MMA")
_PTX_TENSOR = re.compile(r"\b(wgmma\.mma_async|mma|tcgen05\.mma)\.\S*?(?:\.m(\d+)n(\d+)k(\d+)\.\S*)?\s")
_PTX_ACCESS = re.compile(
    r"^\s*(?:@!?%\w+ )?((?:ld|st)\.global\S*|cp\.async\.c[ag]\S*|cp\.async\.bulk\.tensor)"
)


class Job(NamedTuple):
    """A kernel to compile; ``by_columns`` says that X lies by columns (and is its own product's operand)."""

    product: str
    dtype: str
    capability: int
    shape: Shape
    boxed: bool
    by_columns: bool


@dataclass(frozen=True)
class Report:
    """Counts for one kernel; multiplications, clocks and issued instructions are a whole tile's, per step."""

    product: str
    dtype: str
    sm: int
    tile: str
    fed_by: str
    by_columns: bool
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    resident: int
    tensor: dict[str, int]
    multiplied: int
    expected: int
    accesses: dict[str, int]
    issued: float
    tensor_clocks: float


def jobs(capabilities: Iterable[int] = CAPABILITIES) -> list[Job]:
    """Every kernel with every tile, dtype and layout, fed in each way that the GPU has."""
    return [
        Job(product, dtype, sm, shape, boxed, by_columns)
        for product, dtype, sm in itertools.product(
            ("gram", "polynomial", "multiply_add"), BITS, capabilities
        )
        for shape in product_shapes.shapes(BITS[dtype], sm)
        for boxed in ((True, False) if product_shapes.has_boxes(sm) else (False,))
        for by_columns in ((False, True) if product == "gram" else (False,))
    ]


def quick_jobs() -> list[Job]:
    """What the tests compile."""
    large, small = product_shapes.shapes(16, 90)
    return [
        Job("polynomial", "bf16", 90, large, True, False),
        Job("gram", "fp16", 90, small, True, True),
        Job("multiply_add", "bf16", 90, large, True, False),
        Job("polynomial", "fp32", 90, product_shapes.shapes(32, 90)[0], True, False),
        Job("polynomial", "bf16", 80, product_shapes.shapes(16, 80)[0], False, False),
        Job("gram", "bf16", 100, large, True, False),
    ]


def _operands(job: Job) -> dict[str, bool | None]:
    """By operand, whether it lies by columns; None if there is none."""
    if job.product == "multiply_add":
        return {"p": False, "q": not job.by_columns, "d": job.by_columns, "out": False}
    d = None if job.product == "gram" else False
    halves = job.by_columns if job.boxed else None
    return {"p": job.by_columns, "q": job.by_columns, "r": halves, "d": d, "out": False}


def compile_kernel(job: Job) -> Any:
    """The compiled kernel, as products.py would launch it for aligned matrices."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fused_optim.kernels.triton import product_kernels, products

    operands, sizes = _operands(job), product_shapes.boxes(job.shape)
    constants = products.constants(job.shape, job.boxed, BITS[job.dtype])
    swapped = {name: job.boxed and bool(by_columns) for name, by_columns in operands.items()}
    if job.product == "multiply_add":
        kernel = product_kernels.rectangular
        constants |= {f"{name.upper()}_SWAPPED": swapped[name] for name in ("p", "q", "d")}
    else:
        kernel = product_kernels.symmetric
        constants |= {"ADD": operands["d"] is not None, "SWAPPED": swapped["p"]}
    signature, fixed, attributes = {}, {}, {}
    aligned = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
        elif name not in operands:
            signature[name] = "fp32" if name in ("alpha", "beta") else "i32"
            attributes |= {(i,): aligned} if name in ("m", "n", "k") else {}
        elif operands[name] is None:
            signature[name], fixed[(i,)] = "constexpr", None
        elif job.boxed:
            rows, columns = sizes[name][:: -1 if swapped[name] else 1]
            signature[name] = f"tensordesc<{job.dtype}[1, {rows}, {columns}]>"
        else:
            unit = 2 if operands[name] else 3
            signature[name] = ("*" + job.dtype, *("constexpr" if j == unit else "i32" for j in (1, 2, 3)))
            fixed[(i, unit)] = 1
            attributes |= {(i, j): aligned for j in (0, 1, 2, 3) if j != unit}
    options = {"num_warps": job.shape.warps, "num_stages": job.shape.stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, fixed, attributes)
    return compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with tensor-core instructions; of a whole tile if half a tile has another."""
    index_of = {instruction.address: i for i, instruction in enumerate(code)}
    loops = list[range]()
    for i, instruction in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", instruction.operands)
        if instruction.opcode.startswith("BRA") and target:
            loops.append(range(index_of.get(int(target[1], 16), i), i + 1))
    tensor = [i for i, instruction in enumerate(code) if _TENSOR.match(instruction.opcode)]
    # Where a wait has to spin it jumps to the end of the kernel and back: a longer way around.
    around = {min((loop for loop in loops if i in loop), key=len, default=range(0)) for i in tensor}
    inner = [a for a in around if not any(b != a and a.start <= b.start and b.stop <= a.stop for b in around)]
    return [code[i] for i in max(inner, key=len)]


def _multiplied(ptx: str, warps: int) -> tuple[dict[str, int], int]:
    """Tensor-core instructions by name, and their multiplications by all warps where the name says so."""
    names, multiplied = collections.Counter[str](), 0
    for kind, *sizes in _PTX_TENSOR.findall(ptx):
        names["".join([kind, *(f".m{m}n{n}k{k}" for m, n, k in [sizes] if m)])] += 1
        if sizes[0]:
            m, n, k = map(int, sizes)
            multiplied += m * n * k * (warps // 4 if kind.startswith("wgmma") else warps)
    return dict(names), multiplied


def report(job: Job) -> Report:
    """Compiles a kernel and counts."""
    import triton

    compiled = compile_kernel(job)
    sass, usage = disassemble(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    ptx, shape = compiled.asm["ptx"], job.shape
    tensor, multiplied = _multiplied(ptx, shape.warps)
    passes = 3 if job.dtype == "fp32" else 1
    tile = 2 * shape.side**2 * shape.depth * passes
    shared = compiled.metadata.shared
    registers = -(-usage["REG"] // 8) * 8 * 32 * shape.warps
    return Report(
        product=job.product,
        dtype=job.dtype,
        sm=job.capability,
        tile=f"{shape.side}x{2 * shape.side}x{shape.depth}",
        fed_by="boxes" if job.boxed else "threads",
        by_columns=job.by_columns,
        warps=shape.warps,
        stages=shape.stages,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=shared,
        resident=min((SHARED_BYTES[job.capability] + 1024) // (shared + 1024), 65536 // registers),
        tensor=tensor,
        multiplied=multiplied,
        # The symmetric kernels have half a tile's code as well.
        expected=tile if job.product == "multiply_add" else tile * 3 // 2,
        accesses=dict(
            collections.Counter(m[1] for line in ptx.splitlines() if (m := _PTX_ACCESS.match(line)))
        ),
        issued=len(main_loop(instructions(sass))) * shape.warps / 4,
        tensor_clocks=tile / product_shapes.multiplied_per_clock(BITS[job.dtype], job.capability),
    )


def table(reports: Iterable[Report]) -> str:
    """One line a kernel."""
    lines = [
        f"{'product':<14}{'dtype':<6}{'sm':>4}  {'tile':<12}{'fed by':<8}{'X by':<8} warps stages registers"
        " spilled  shared resident  issued/tensor clocks  instructions"
    ]
    for r in reports:
        layout = "columns" if r.by_columns else "rows"
        tensor = " ".join(f"{count}x{name}" for name, count in r.tensor.items())
        lines.append(
            f"{r.product:<14}{r.dtype:<6}{r.sm:>4}  {r.tile:<12}{r.fed_by:<8}{layout:<8}{r.warps:>6}"
            f"{r.stages:>7}{r.registers:>10}{r.spilled:>8}{r.shared:>8}{r.resident:>9}"
            f"{r.issued:>9.0f}/{r.tensor_clocks:<12.0f}  {tensor}"
        )
    return "\n".join(lines)


def triangles(sizes: Iterable[int] = (1024, 2048, 4096, 8192)) -> str:
    """What an H200 computes of a bf16 Gram matrix, and what the model of its tiles predicts."""
    lines = ["     m  tile     tiles  halves  of a full product  clocks per column"]
    for m in sizes:
        shape = product_shapes.symmetric_shape(1, m, 16, 90, 132)
        tiles, halves = product_shapes.triangle(m, shape.side)
        share = (tiles + halves / 2) * 2 * shape.side**2 / m**2
        clocks = product_shapes.clocks(shape, tiles + halves / 2, 16, 90, 132)
        lines.append(
            f"{m:>6}  {shape.side}x{2 * shape.side:<5}{tiles:>5}{halves:>8}{share:>19.1%}{clocks:>19.1f}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Command line."""
    parser = command_line("static_products", __doc__)
    parser.add_argument("--quick", action="store_true", help="just what the tests compile")
    options = parser.parse_args(argv)
    check_triton(parser)
    reports = run(report, quick_jobs() if options.quick else jobs(options.sm), options.workers)
    print(table(reports), triangles(), sep="\n\n")
    write("static_products", argv, options, [asdict(r) for r in reports])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
