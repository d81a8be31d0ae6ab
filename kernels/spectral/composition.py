"""``S^(-1/2)`` by composed rational and polynomial steps: the interval shrinks with every inverse.

A step is Zolotarev's best function with one term, ``f(x) = C (1 + w / (x + t))``. The matrix ``f(S)² S`` has
a far smaller condition number, and comes from the same inverse and its square; after one step at a ratio of
300 singular values lie within a factor of 2.8 of each other. What is left is a polynomial of few products, or
a sum of a few well-conditioned inverses. Only the first step needs float64 for large ratios.
"""

# Matrices have the papers' capital letters.
# pyright: reportConstantRedefinition=false
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import blas, products, rational
from .matrices import add_identity

ROUNDING = 4
"""How many times a tolerance may be exceeded by the machine epsilon times the condition number."""

_DEGREES = range(1, 25)
_MOST_STEPS = 5
# Room for eigenvalues that rounding pushed out of the interval; narrower ones gain nothing.
_SLACK = 2.0**-10
_NARROWEST = 0.98
# What an ending takes beside its products.
_BESIDE = 0.5


class Costs(NamedTuple):
    """Times over that of a float32 product: of an inverse, and of both in float64 (November 2026)."""

    inverse: float
    fine_product: float
    fine_inverse: float


_SMALL, _LARGE = 192, 384
# By size, then by library: MKL, and oneDNN, whose products take half as long.
_COSTS = (
    (Costs(5, 2, 6), Costs(5, 2, 6)),
    (Costs(2.7, 2.2, 4), Costs(4.3, 3.5, 6.2)),
    (Costs(1.5, 2.3, 3.3), Costs(2.6, 4.5, 7)),
)


def costs(m: int, device_type: str) -> Costs:
    """Those of m x m matrices."""
    return _COSTS[(m >= _SMALL) + (m >= _LARGE)][blas.by_onednn(m, m, device_type)]


class Step(NamedTuple):
    """``constant (1 + weight / (x + shift))``, and the ratio that it leaves."""

    constant: float
    weight: float
    shift: float
    ratio: float


class Power(NamedTuple):
    """A polynomial in ``(x - middle) / half`` near ``x^(-1/2)``, and its largest relative error."""

    coefficients: tuple[float, ...]
    middle: float
    half: float
    error: float


class Plan(NamedTuple):
    """Steps, and the polynomial after them; None for a sum of inverses."""

    steps: tuple[Step, ...]
    power: Power | None


def _step(ratio: float) -> Step:
    """The best step for an interval; its values stay at most one."""
    terms = rational.zolotarev(1, ratio)
    high = 1 + terms.error
    return Step(terms.constant / high, terms.weights[0], terms.shifts[0], high / (1 - terms.error))


@functools.lru_cache(maxsize=1024)
def power(degree: int, ratio: float) -> Power:
    """A polynomial for arguments between ``1/ratio²`` and 1, by least squares of the relative error.

    >>> power(6, 1.5).error < 1e-4
    True
    """
    low, high = min(ratio**-2 * (1 - _SLACK), _NARROWEST), 1 + _SLACK
    middle, half = (high + low) / 2, (high - low) / 2
    points = np.cos(np.pi * (np.arange(8 * degree + 1) + 0.5) / (8 * degree + 1))
    roots = np.sqrt(middle + half * points)
    values = np.polynomial.chebyshev.chebvander(points, degree) * roots[:, None]
    series = np.linalg.lstsq(values, np.ones_like(points))[0]
    error = np.abs(values @ series - 1).max()
    coefficients = np.polynomial.chebyshev.cheb2poly(series)
    return Power(tuple(coefficients.tolist()), middle, half, float(error))


def _block(degree: int) -> int:
    """Length of the pieces of a polynomial that takes the fewest products."""
    return min(range(2, degree + 2), key=lambda size: (_products(degree, size), size))


def _products(degree: int, size: int) -> int:
    """Powers up to that of the size, and one product for every further piece."""
    pieces = math.ceil((degree + 1) / size)
    return max(size - (pieces == 1), 1) - 1 + pieces - 1


def _bears(dtype: torch.dtype, ratio: float, tolerance: float) -> bool:
    """Whether a dtype bears the condition number."""
    return torch.finfo(dtype).eps <= ROUNDING * tolerance / ratio**2


@functools.lru_cache(maxsize=1024)
def plan(ratio: float, tolerance: float, costs: Costs, lowest: torch.dtype = torch.float32) -> Plan:
    """The cheapest composition within a tolerance.

    >>> len(plan(300.0, 3e-5, costs(64, "cpu")).steps)
    1
    """
    steps: list[Step] = []
    found: list[tuple[float, Plan]] = []
    left, spent = ratio, 0.0
    for _ in range(_MOST_STEPS):
        borne = _bears(lowest, left, tolerance)
        inverse, product = (costs.inverse, 1.0) if borne else (costs.fine_inverse, costs.fine_product)
        terms = rational.fewest(left, tolerance)
        found.append((spent + len(terms.shifts) * inverse, Plan(tuple(steps), None)))
        ending = next((p for p in (power(d, left) for d in _DEGREES) if p.error <= tolerance), None)
        if ending is not None:
            degree = len(ending.coefficients) - 1
            products = _products(degree, _block(degree)) + _BESIDE
            found.append((spent + products * product, Plan(tuple(steps), ending)))
        # A step's inverse and its square; then one factor more to multiply.
        spent += inverse + product + 1
        steps.append(_step(left))
        left = steps[-1].ratio
    return min(found, key=lambda each: each[0])[1]


@functools.lru_cache(maxsize=256)
def _pieces(ending: Power, dtype: torch.dtype) -> tuple[int, Tensor, Tensor]:
    """Length of a polynomial's pieces, their coefficients [pieces, powers] and constants [pieces, 1, 1]."""
    size = _block(len(ending.coefficients) - 1)
    count = math.ceil(len(ending.coefficients) / size)
    table = torch.zeros(count * size, dtype=torch.float64, device="cpu")
    table[: len(ending.coefficients)] = torch.tensor(ending.coefficients, dtype=torch.float64, device="cpu")
    table = table.view(count, size).to(dtype)
    return size, table[:, 1:].contiguous(), table[:, :1, None].contiguous()


def _evaluate(R: Tensor, ending: Power) -> Tensor:
    """A polynomial of [batch, m, m], by Paterson and Stockmeyer: pieces of it, times powers in turn."""
    size, table, constants = _pieces(ending, R.dtype)
    powers = R.new_empty(max(size if len(table) > 1 else size - 1, 1), *R.shape)
    add_identity(torch.mul(R, 1 / ending.half, out=powers[0]), -ending.middle / ending.half)
    for k in range(1, len(powers)):
        blas.multiply(powers[(k - 1) // 2], powers[k // 2], powers[k])
    # All pieces in one product; their constants join the diagonals.
    parts = torch.mm(table, powers[: size - 1].flatten(1)).view(-1, *R.shape)
    parts.diagonal(dim1=-2, dim2=-1).add_(constants)
    total = parts[-1]
    for part in reversed(parts[:-1].unbind()):
        total = blas.multiply_add(part, total, powers[size - 1])
    return total


def _multiply(P: Tensor, Q: Tensor) -> Tensor:
    """``P Q`` with Q's mean set apart, which overwrites Q.

    What Q does to the largest singular values cancels on the diagonal to 1/ratio of it: for matrices of rank
    one and 512 rows at a ratio of 300 the result is off by 7e-5 this way, and by 1.1e-4 without.
    """
    mean = Q.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)
    return blas.multiply_add(P * mean, P, add_identity(Q, -mean))


def inverse_root(S: Tensor, ratio: float, tolerance: float, lowest: torch.dtype = torch.float32) -> Tensor:
    """``S^(-1/2)`` of [batch, m, m] with eigenvalues from ``1/ratio²`` to 1.

    Computed in S's dtype as long as the ratio asks for it, then in ``lowest``.
    """

    def lowered(A: Tensor) -> Tensor:
        return A.to(lowest) if _bears(lowest, ratio, tolerance) else A

    chosen = plan(ratio, tolerance, costs(S.shape[-1], S.device.type), lowest)
    R, Q = lowered(S), None
    for C, w, t, left in chosen.steps:
        B = rational.shifted_inverse(R, t, (1 + t) / (ratio**-2 + t), tolerance)
        ratio = left
        # f² x, by x B = 1 - t B, with one product.
        change = products.polynomial(B, C**2 * w * (w - 2 * t), -(C**2) * w**2 * t)
        R = lowered(add_identity(change.add_(R, alpha=C**2), 2 * w * C**2))
        factor = lowered(add_identity(B.mul_(C * w), C))
        Q = factor if Q is None else _multiply(factor, Q.to(factor.dtype))
    P = rational.inverse_root(R, ratio, tolerance) if chosen.power is None else _evaluate(R, chosen.power)
    return P if Q is None else _multiply(P, Q)
