"""``python -m bench newton_schulz``: times matrix functions of the optimizers beside those they replace."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

try:
    from torch.optim import _muon
except ImportError:
    _muon = None

from fused_optim.kernels.spectral import products
from fused_optim.spectral import orthogonalize, soft_clip

from . import ceiling
from .comparison import Absent, Case, Contender, Later, Suites, compare, parser_of
from .iterations import ITERATIONS, admit
from .muons import JORDAN, distance, polynomials, whole_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def released_soft_clip(X: Tensor, c: float, dtype: torch.dtype) -> Tensor:
    """SPECTRA's ten coupled iterations on the Gram matrix, written from specs/04."""
    Y = X.to(dtype)
    S = Y @ Y.mT
    bound = torch.minimum(S.abs().sum(-1).max(), torch.linalg.matrix_norm(S).max())
    identity = torch.eye(S.shape[-1], dtype=dtype, device=X.device)
    a = 1 + bound / c**2
    root, inverse = (identity + S / c**2) / a, identity
    for _ in range(10):
        T = (3 * identity - inverse @ root) / 2
        root, inverse = root @ T, T @ inverse
    return ((inverse / a.sqrt()) @ Y).to(X.dtype)


def _decaying(rows: int, columns: int, decades: float, device: torch.device) -> Tensor:
    """A Gaussian matrix whose rows fall in size over some decades: singular values do, too."""
    falling = 10 ** (-decades * torch.linspace(0, 1, rows, device=device))
    mixed = torch.linalg.qr(torch.randn(rows, rows, device=device)).Q
    return mixed @ (falling[:, None] * torch.randn(rows, columns, device=device))


def _torchs(X: Tensor) -> Tensor:
    assert _muon is not None
    return _muon._zeropower_via_newtonschulz(X, JORDAN, 5, 1e-7)


def _ours(X: Tensor, form: Any = "auto") -> Tensor:
    return orthogonalize(X, "jordan", 5, form=form)


def _one_by_one(batches: Sequence[Tensor]) -> None:
    for X in batches:
        for matrix in X:
            _torchs(matrix)


def _in_batches(batches: Sequence[Tensor], form: str) -> None:
    for X in batches:
        _ours(X, form)


def _worst(function: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> float:
    return max(distance(function(X[0]), polynomials(X[0], 5)) for X in batches)


def _torchs_loop(chosen: Sequence[Tensor]) -> Contender | Absent:
    label = "torch.optim.Muon"
    if _muon is None:
        return Absent(label, "missing", "torch has it from 2.9 on")
    one_by_one, worst = partial(_one_by_one, chosen), partial(_worst, _torchs, chosen)
    return Contender(label, one_by_one, worst, ceiling.full(chosen))


def muon(args: argparse.Namespace, device: torch.device) -> Iterator[Later]:
    """All hidden matrices of a Llama, four d × d and three of d × d_ff a layer, and the matmuls' speed."""
    d, d_ff, layers = args.width, 4 * args.width, args.layers
    shapes = [(4 * layers, d, d), (3 * layers, d_ff, d)]
    batches = [torch.randn(shape, device=device) for shape in shapes]
    products = [ceiling.Products(X) for X in batches]
    limits = {"torch.optim.Muon": 0.5 if device.type == "cuda" else 0.75}
    parts = {"all": slice(None), f"{d}x{d}": slice(1), f"{d_ff}x{d}": slice(1, None)}
    for name, part in parts.items():
        title = f"muon {name}, {layers} layers"
        wanted = limits if name == "all" else {}
        yield Later(title, partial(_iterations, title, batches[part], products[part], wanted))


def _iterations(
    title: str, chosen: Sequence[Tensor], products: Sequence[ceiling.Products], limits: dict[str, float]
) -> Case:
    contenders = [
        Contender(
            label,
            partial(_in_batches, chosen, form),
            partial(_worst, partial(_ours, form=form), chosen),
            ceiling.ours(chosen, JORDAN, form),
        )
        for label, form in (("fused_optim", "auto"), ("fused_optim, standard form", "standard"))
    ]
    found = [_torchs_loop(chosen), *(admit(label, peer, chosen) for label, peer in ITERATIONS.items())]
    return Case(
        title,
        contenders + [one for one in found if isinstance(one, Contender)],
        limits,
        [one for one in found if isinstance(one, Absent)],
        ceiling.matmuls(products),
    )


class _Clipped:
    """A matrix to clip, and the definition by eigenvalues in float64: found when asked for, once."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._sizes, self._dtype, self._device = (rows, columns), dtype, device

    @cached_property
    def given(self) -> Tensor:
        torch.manual_seed(0)
        return _decaying(*self._sizes, 2, self._device).to(self._dtype)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        Y = self.given.double()
        values, vectors = torch.linalg.eigh(Y @ Y.mT)
        return values.clamp(min=0), vectors

    def norm(self) -> float:
        return self._eigen[0].max().sqrt().item()

    def expected(self, c: float) -> Tensor:
        values, vectors = self._eigen
        return (vectors * (1 + values / c**2).rsqrt().unsqueeze(-2)) @ (vectors.mT @ self.given.double())


def clip(args: argparse.Namespace, device: torch.device) -> Iterator[Later]:
    """Soft clipping against the released iterations in the same dtype, over ratios of the norm to c."""
    for rows, columns in args.sizes:
        for name, dtype in DTYPES.items():
            clipped = _Clipped(rows, columns, dtype, device)
            for wanted in args.ratios:
                title = f"soft clip {rows}x{columns} {name}, ratio {wanted:g}"
                yield Later(title, partial(_clip, title, clipped, wanted, dtype))
                title = f"{title}, as exact as released"
                yield Later(title, partial(_clip_as_exact, title, clipped, wanted, dtype))


def _released(X: Tensor, c: float, expected: Tensor, dtype: torch.dtype) -> Contender:
    call = partial(released_soft_clip, X, c, dtype)
    return Contender("released", call, lambda: distance(call(), expected))


def _clip(title: str, clipped: _Clipped, wanted: float, dtype: torch.dtype) -> Case:
    X, c = clipped.given, clipped.norm() / wanted
    expected, call = clipped.expected(c), partial(soft_clip, X, c)
    contenders = [
        Contender("fused_optim", call, lambda: distance(call(), expected)),
        _released(X, c, expected, dtype),
        Contender("orthogonalize", lambda: orthogonalize(X, "jordan", 5)),
    ]
    return Case(title, contenders, {"released": 1.0, **({"orthogonalize": 1.0} if X.is_cuda else {})})


def _clip_as_exact(title: str, clipped: _Clipped, wanted: float, dtype: torch.dtype) -> Case:
    X, c = clipped.given, clipped.norm() / wanted
    expected = clipped.expected(c)
    theirs = _released(X, c, expected, dtype)
    assert theirs.error is not None
    call = partial(soft_clip, X, c, tolerance=max(theirs.error(), 1e-7))
    ours = Contender("fused_optim", call, lambda: distance(call(), expected))
    return Case(title, [ours, theirs], {"released": 0.5})


def symmetric(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """The three products against torch.matmul."""
    cases = []
    for n in args.products:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        A = torch.randn(1, n, n, device=device).to(dtype)
        A = (A + A.mT) / n
        limits = {"matmul": 1 / 1.6} if device.type == "cuda" else {}
        matmul = Contender("matmul", lambda A=A: torch.matmul(A, A))
        calls = {
            "gram": lambda A=A: products.gram(A),
            "polynomial": lambda A=A: products.polynomial(A, 2.0, 3.0),
        }
        for name, call in calls.items():
            cases.append(Case(f"{name} {n}", [Contender("fused_optim", call), matmul], limits))
        both = [Contender("fused_optim", lambda A=A: products.multiply_add(A, A, 2.0)), matmul]
        cases.append(Case(f"multiply_add {n}", both))
    return cases


SUITES: Suites = {"muon": muon, "step": whole_step, "clip": clip, "products": symmetric}


def _size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns or rows)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("newton_schulz", __doc__, SUITES)
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama")
    parser.add_argument("--width", type=int, default=1024, help="its width d; d_ff is four times that")
    parser.add_argument("--sizes", type=_size, nargs="+", default=[(512, 512), (1024, 1024), (1024, 4096)])
    parser.add_argument("--ratios", type=float, nargs="+", default=[3.0, 30.0, 300.0, 1e4])
    parser.add_argument("--products", type=int, nargs="+", help="sizes of the symmetric products")
    return parser


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        args.layers, args.width, args.sizes, args.products, args.rounds = 1, 64, [(48, 64)], [64], 3
    if args.products is None:
        args.products = [4096, 8192] if args.device.startswith("cuda") else [1024]
    return compare("newton_schulz", SUITES, args, argv)
