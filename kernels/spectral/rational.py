"""``S^(-1/2)`` as a sum of inverses, with the best coefficients there are for an interval.

Zolotarev's function ``C (1 + sum_j w_j / (x + t_j))`` is nearest to ``x^(-1/2)`` in relative error on
``[1/ratio², 1]``; every term costs the inverse of a shifted matrix, half the operations of a product, and
terms neither amplify each other's rounding nor diverge outside of the interval.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import blas
from .matrices import add_identity

# Rows from which a matrix is halved; of several together smaller ones are.
_HALVED_FROM, _HALVED_TOGETHER_FROM = 128, 65
# Multiples of it, as lengths of rows, leave columns few places in the caches: torch's zeroing of a triangle
# takes half of a factorization's time then (November 2026). A few rows more mend that.
_ALIASED_BYTES, _PADDING = 1024, 8
_LAPACK_FROM = 192
_EASY = 0.3
_BACKWARD = 8
_MOST = 24


class Terms(NamedTuple):
    """``constant (1 + sum(weights / (x + shifts)))`` and its largest relative error."""

    constant: float
    weights: tuple[float, ...]
    shifts: tuple[float, ...]
    error: float


def _mean(a: float, b: float) -> float:
    """Arithmetic-geometric mean."""
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a


def _tangent(u: float, parameter: float) -> float:
    """Jacobi's ``sn/cn`` at u for the complementary parameter, by descending Landen transformations."""
    a, root = 1.0, parameter
    pairs: list[tuple[float, float]] = []
    while True:
        root = math.sqrt(root)
        pairs.append((a, root))
        c = (a + root) / 2
        if abs(a - root) <= 1e-9 * a:
            break
        root *= a
        a = c
    u *= c
    a, dn = math.cos(u) / math.sin(u), 1.0
    c *= a
    for mean, root in reversed(pairs):
        a *= c
        c *= dn
        dn = (root + a) / (mean + a)
        a = c / mean
    return 1 / c


@functools.lru_cache(maxsize=1024)
def zolotarev(count: int, ratio: float) -> Terms:
    """The best ``count`` terms for arguments between ``1/ratio²`` and 1.

    >>> terms = zolotarev(6, 30.0)
    >>> terms.error < 1e-5
    True
    >>> value = terms.constant * (1 + sum(w / (0.01 + t) for w, t in zip(terms.weights, terms.shifts)))
    >>> abs(value / 0.01**-0.5 - 1) < 1e-5
    True
    """
    lower = 1 / ratio
    quarter = math.pi / 2 / _mean(1.0, lower)
    nodes = [
        (lower * _tangent(i * quarter / (2 * count + 1), lower**2)) ** 2 for i in range(1, 2 * count + 1)
    ]
    poles, zeros = nodes[0::2], nodes[1::2]
    weights = tuple(
        math.prod(zero - pole for zero in zeros) / math.prod(other - pole for other in poles if other != pole)
        for pole in poles
    )

    def product(x: float) -> float:
        return math.sqrt(x) * (1 + sum(w / (x + t) for w, t in zip(weights, poles, strict=True)))

    # The error alternates between its extremes, and both ends of the interval are among them.
    ends = product(1.0), product(lower**2)
    return Terms(2 / sum(ends), weights, tuple(poles), abs(ends[0] - ends[1]) / sum(ends))


def fewest(ratio: float, tolerance: float) -> Terms:
    """As few terms as the tolerance allows."""
    candidates = (zolotarev(count, ratio) for count in range(1, _MOST))
    return next((terms for terms in candidates if terms.error <= tolerance), zolotarev(_MOST, ratio))


def _inverse(A: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(A).L)


def _by_lapack(A: Tensor, shift: float | Tensor, dtype: torch.dtype) -> Tensor:
    m = A.shape[-1]
    size = m if m * dtype.itemsize % _ALIASED_BYTES else m + _PADDING
    room = A.new_empty(len(A), size, size, dtype=dtype)
    room[:, m:], room[:, :m, m:] = 0, 0
    room[:, :m, :m] = A
    add_identity(room[:, :m, :m], shift)
    room.diagonal(dim1=-2, dim2=-1)[:, m:] = 1
    return _inverse(room)[:, :m, :m]


def _by_halves(A: Tensor, shift: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly all is matrix products. Its error grows with the square of the condition number."""
    least = _HALVED_FROM if len(A) == 1 else _HALVED_TOGETHER_FROM

    def inverse(A: Tensor) -> Tensor:
        m = A.shape[-1]
        if m < least:
            return _inverse(A)
        h = m // 2
        first, B = inverse(A[:, :h, :h]), A[:, :h, h:]
        F = blas.multiply(first, B)
        schur = inverse(blas.multiply_add(A[:, h:, h:], B.mT, F, alpha=-1))
        corner = blas.multiply(F, schur)
        out = torch.empty_like(A)
        out[:, h:, h:] = schur
        out[:, :h, :h] = blas.multiply_add(first, corner, F.mT)
        out[:, :h, h:] = corner.neg_()
        out[:, h:, :h] = corner.mT
        return out

    return inverse(add_identity(A.to(dtype, copy=True), shift))


def _method(
    m: int, condition: float, dtype: torch.dtype, tolerance: float
) -> tuple[Callable[[Tensor, float | Tensor, torch.dtype], Tensor], torch.dtype]:
    """By halves in the given dtype, or in float64; by LAPACK where halves are too inaccurate for that."""
    for work in (dtype, torch.float64):
        if condition**2 * torch.finfo(work).eps < _EASY:
            return _by_halves, work
        # Of small matrices LAPACK takes one after the other, on one thread.
        if m >= _LAPACK_FROM and condition * torch.finfo(work).eps * _BACKWARD < tolerance:
            return _by_lapack, work
    return _by_lapack, torch.float64


def shifted_inverse(A: Tensor, shift: float, condition: float, tolerance: float) -> Tensor:
    """``(A + shift I)^(-1)`` of symmetric positive definite [batch, m, m] in A's dtype."""
    invert, work = _method(A.shape[-1], condition, A.dtype, tolerance)
    return invert(A, shift, work).to(A.dtype)


def inverse_root(S: Tensor, ratio: float, tolerance: float) -> Tensor:
    """``S^(-1/2)`` of [batch, m, m] with eigenvalues from ``1/ratio²`` to 1."""
    terms = fewest(ratio, tolerance)
    conditions = [(1 + shift) / (ratio**-2 + shift) for shift in terms.shifts]
    methods = [_method(S.shape[-1], condition, S.dtype, tolerance) for condition in conditions]
    total = add_identity(torch.zeros_like(S), terms.constant)
    for method in dict.fromkeys(methods):
        invert, work = method
        chosen = [i for i, found in enumerate(methods) if found == method]
        shifts = torch.tensor([terms.shifts[i] for i in chosen], dtype=work, device=S.device)
        factors = [terms.constant * terms.weights[i] for i in chosen]
        weights = torch.tensor(factors, dtype=work, device=S.device)
        # Terms together: threads wait for each other once a product, not once a term.
        for matrix, result in zip(S, total, strict=True):
            inverses = invert(matrix.expand(len(chosen), -1, -1), shifts, work)
            result.add_(torch.einsum("k,kij->ij", weights, inverses).to(total.dtype))
    return total
