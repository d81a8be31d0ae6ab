"""Times the matrix products beside torch's own, after checking them against float64.

``python -m bench products [--out FILE]`` needs a GPU and says so where there is none. ``--sweep`` times the
Gram matrix with other tiles than the one that is chosen, to check that choice.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_optim.kernels.triton import product_shapes, products

from .record import Record, add_out, begin, save
from .timing import Call, Sweep, interleave, ratio

CHECKED_ROWS = 128
A, B, C = 2.0, 0.5, -0.25
"""The coefficients of what is timed."""


class Case(NamedTuple):
    """A product of ``batches`` matrices m by n; the square ones are m by m."""

    product: str
    batches: int
    m: int
    n: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def label(self) -> str:
        return f"{self.product} {self.batches}x{self.m}x{self.n} {str(self.dtype).removeprefix('torch.')}"

    @property
    def flops(self) -> int:
        """Of the full product, which torch computes."""
        return 2 * self.batches * self.m * self.m * (self.m if self.product == "polynomial" else self.n)


SQUARES = [Case(product, 1, m, m) for m in (4096, 8192, 2048, 1024) for product in ("gram", "polynomial")]
NEWTON_SCHULZ = [
    *(Case(product, 12, 1024, 4096) for product in ("gram", "polynomial", "multiply_add")),
    *(Case("multiply_add", 1, m, n) for m, n in ((2048, 5504), (4096, 11008))),
]
FP32 = [Case(product, 1, 4096, 4096, torch.float32) for product in ("gram", "multiply_add")]
ALL = [*NEWTON_SCHULZ, *SQUARES, *FP32]
"""What Muon computes first: a run may hit its time limit."""


def _inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """X, and a symmetric matrix with the eigenvalues that an iteration meets."""
    generator = torch.Generator(device).manual_seed(0)
    kind: dict[str, Any] = {"device": device, "generator": generator}
    X = torch.randn(case.batches, case.m, case.n, **kind)
    S = torch.randn(case.batches, case.m, case.m, **kind) / math.sqrt(8 * case.m)
    return X.to(case.dtype), (S + S.mT).to(case.dtype)


def _calls(case: Case, X: Tensor, S: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Ours and torch's, each with an output of its own."""
    ours, theirs = (torch.empty_like(X if case.product == "multiply_add" else S) for _ in range(2))
    if case.product == "gram":
        return lambda: products.gram(X, ours), lambda: torch.matmul(X, X.mT, out=theirs)
    if case.product == "polynomial":
        return (
            lambda: products.polynomial(S, B, C, ours),
            lambda: torch.baddbmm(S, S, S, beta=B, alpha=C, out=theirs),
        )
    return lambda: products.multiply_add(X, S, A, ours), lambda: torch.baddbmm(X, S, X, beta=A, out=theirs)


def _expected(case: Case, X: Tensor, S: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the first matrix in float64."""
    x, s = X[0].double(), S[0].double()
    if case.product == "gram":
        return x[rows] @ x.mT
    if case.product == "polynomial":
        return B * s[rows] + C * s[rows] @ s
    return A * x[rows] + s[rows] @ x


def _check(case: Case, X: Tensor, S: Tensor, calls: Iterator[Callable[[], Tensor]]) -> tuple[float, float]:
    """Relative errors of both; that of ours is no larger, and what is symmetric is to the bit."""
    rows = torch.linspace(0, case.m - 1, CHECKED_ROWS, device=X.device).long()
    expected = _expected(case, X, S, rows)
    ours, theirs = (call() for call in calls)
    if case.product != "multiply_add" and not torch.equal(ours, ours.mT):
        raise AssertionError(f"{case.label}: the result is not symmetric")
    errors = [float((y[0][rows].double() - expected).norm() / expected.norm()) for y in (ours, theirs)]
    # Both round once; TF32 in three parts keeps two bits less than fp32.
    allowed = 1.1 * errors[1] if case.dtype != torch.float32 else 2.0**-18
    if not errors[0] <= allowed:
        raise AssertionError(f"{case.label}: relative error {errors[0]:.2e}, torch's {errors[1]:.2e}")
    return errors[0], errors[1]


def _tile(case: Case, device: torch.device) -> str:
    machine = products._machine(device)
    bits = 8 * case.dtype.itemsize
    if case.product == "multiply_add":
        shape = product_shapes.rectangular_shape(case.batches, case.m, case.n, bits, *machine)
    else:
        shape = product_shapes.symmetric_shape(case.batches, case.m, bits, *machine)
    return f"{shape.side}x{2 * shape.side}x{shape.depth}, {shape.warps} warps, {shape.stages} stages"


def measure(case: Case, device: torch.device, rounds: int, budget_s: float) -> dict[str, Any]:
    """Checks a case and times it."""
    X, S = _inputs(case, device)
    calls = _calls(case, X, S)
    errors = _check(case, X, S, iter(calls))
    timed = [Call(name, device, call) for name, call in zip(("ours", "torch"), calls, strict=True)]
    interleave(timed, rounds, budget_s, Sweep(device))
    ours, theirs = timed
    speedup, q1, q3 = ratio(theirs.time, ours.time)
    return {
        "case": case.label,
        "tile": _tile(case, device),
        "ms": ours.time.summary(),
        "torch_ms": theirs.time.summary(),
        "host_ms": ours.host.summary(),
        "speedup": speedup,
        "speedup_quartiles": [q1, q3],
        "torch_tflops": case.flops / theirs.time.median / 1e9,
        "error": errors[0],
        "torch_error": errors[1],
    }


def _line(row: dict[str, Any]) -> str:
    q1, q3 = row["speedup_quartiles"]
    return (
        f"{row['case']:<36}{row['ms']['median']:>9.3f} ms  torch {row['torch_ms']['median']:>9.3f} ms"
        f" ({row['torch_tflops']:.0f} TFLOP/s)  {row['speedup']:.2f}x ({q1:.2f}-{q3:.2f})"
        f"  host {row['host_ms']['median']:.3f} ms  error {row['error']:.1e}  {row['tile']}"
    )


def _attempt(case: Case, device: torch.device, rounds: int, budget_s: float) -> dict[str, Any]:
    """Measures and prints a case; one that fails says why, and stops no other."""
    try:
        row = measure(case, device, rounds, budget_s)
    except Exception as error:
        row = {"case": case.label, "failed": f"{type(error).__name__}: {error}"}
    print(f"{case.label}: {row['failed']}" if "failed" in row else _line(row), flush=True)
    torch.cuda.empty_cache()
    return row


@contextmanager
def _only(shape: product_shapes.Shape, band: int) -> Iterator[None]:
    """Launches with this tile alone."""
    before = product_shapes.shapes, products.BAND
    product_shapes.shapes, products.BAND = (lambda *_: (shape,)), band
    try:
        yield
    finally:
        product_shapes.shapes, products.BAND = before


def sweep(device: torch.device, rounds: int, budget_s: float) -> list[dict[str, Any]]:
    """The Gram matrix with other tiles, stages and bands."""
    rows = []
    for case, (side, warps), stages, band in itertools.product(
        [c for c in SQUARES if c.product == "gram"], [(128, 8), (128, 4), (64, 4)], (3, 4), (2, 4, 8)
    ):
        with _only(product_shapes.Shape(side, 64, stages, warps), band):
            rows.append(_attempt(case, device, rounds, budget_s) | {"band": band})
    return rows


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench products", description=__doc__)
    add_out(parser)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for a case")
    parser.add_argument(
        "--deadline", type=float, default=math.inf, help="start no case after so many seconds"
    )
    parser.add_argument("--sweep", action="store_true", help="time other tiles")
    options = parser.parse_args(argv)
    started = time.monotonic()
    if not torch.cuda.is_available():
        print("no GPU that torch can see: nothing was timed. `python -m bench static_products` needs none")
        save({**begin("products", argv, torch.device("cpu")), "cases": []}, options.out)
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    result: Record = {**begin("products", argv, device), "cases": [], "left_out": []}
    if options.sweep:
        result["cases"] = sweep(device, options.rounds, options.budget)
    for case in [] if options.sweep else ALL:
        if time.monotonic() - started > options.deadline:
            result["left_out"].append(case.label)
            continue
        result["cases"].append(_attempt(case, device, options.rounds, options.budget))
        save(result, options.out)
    if result["left_out"]:
        print(f"left out for lack of time: {', '.join(result['left_out'])}")
    save(result, options.out)
    return int(any("failed" in row for row in result["cases"]) and not options.sweep)
