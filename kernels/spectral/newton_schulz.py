"""Orthogonalisation by Newton–Schulz iterations, on X itself or on its Gram matrix."""

# Matrices have the papers' capital letters.
# pyright: reportConstantRedefinition=false
from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import blas
from .coefficients import Coefficients
from .matrices import add_identity
from .products import by_triangle, gram, multiply_add, multiply_commuting, polynomial, triangle_share

# Steps between two products that touch X, because the Gram matrix holds squares. For a spectrum over two
# decades, 256 x 256, Jordan's five in bfloat16 are off by 0.016 in standard form, by 0.025 with restarts at
# 2 and 4, by 0.10 with one at 2 (float16: 0.015), by 0.39 with none.
_BETWEEN_RESTARTS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 3, torch.float64: 4}


# Smaller matrices take no time worth an error up to twice as large in bfloat16.
_GRAM_FROM = 256


def restarts(steps: int, dtype: torch.dtype) -> list[int]:
    """The steps that begin with a new Gram matrix of the current X, besides the first."""
    between = _BETWEEN_RESTARTS[dtype]
    # The first steps have the steepest polynomials: never more than two before the first restart.
    return list(range(2, steps, between))


def standard(X: Tensor, steps: Iterable[Coefficients]) -> Tensor:
    """``X := a X + (b A + c A²) X`` with ``A = X Xᵀ``."""
    for a, b, c in steps:
        A = gram(X)
        X = multiply_add(X, polynomial(A, b, c) if c else b * A, a)
    return X


def in_gram_form(X: Tensor, steps: Sequence[Coefficients], restarts: Iterable[int]) -> Tensor:
    """The same iterates as ``Q X``: X itself takes part at the start, at restarts and at the end only."""
    for begin, end in itertools.pairwise([0, *restarts, len(steps)]):
        if end - begin == 1:
            # Rounding a I + Z costs more accuracy than adding a X in the product.
            X = standard(X, steps[begin:end])
        else:
            X = blas.multiply(inverse_root(gram(X), steps[begin:end]), X)
    return X


def inverse_root(R: Tensor, steps: Sequence[Coefficients]) -> Tensor:
    """Q with ``Q R Q`` nearer to the identity, the product of ``a I + b R + c R²`` over the steps."""
    Q = None
    for i, (a, b, c) in enumerate(steps):
        Z = polynomial(R, b, c) if c else b * R
        if i + 1 < len(steps):
            RZ = multiply_commuting(R, Z, a)
            R = multiply_commuting(RZ, Z, a)
        Q = add_identity(Z, a) if Q is None else multiply_commuting(Q, Z, a)
    assert Q is not None
    return Q


def flops(
    m: int,
    n: int,
    steps: Sequence[Coefficients],
    dtype: torch.dtype,
    device_type: str,
    form: str,
) -> int:
    """Floating-point operations of the matrix products for one m × n matrix, m <= n."""
    share = triangle_share(m, dtype) if by_triangle(m, dtype, device_type) else 1.0
    begun, small = len(steps), 0
    if form == "gram":
        begun = 1 + len(restarts(len(steps), dtype))
        small = 3 * (len(steps) - begun)
    squares = sum(bool(c) for _, _, c in steps)
    symmetric = begun * m * m * n + (squares + small) * m**3
    return round(2 * (share * symmetric + begun * m * m * n))


def auto_form(m: int, n: int, steps: Sequence[Coefficients], dtype: torch.dtype, device_type: str) -> str:
    """The form that ``"auto"`` means for m x n matrices, m <= n."""
    if m < _GRAM_FROM:
        return "standard"
    return min("standard", "gram", key=lambda form: flops(m, n, steps, dtype, device_type, form))


def orthogonalize(Y: Tensor, steps: Sequence[Coefficients], form: str) -> Tensor:
    """The iteration on [batch, m, n], m <= n, whose singular values are at most one."""
    m, n = Y.shape[-2:]
    if form == "auto":
        form = auto_form(m, n, steps, Y.dtype, Y.device.type)
    if form == "gram":
        return in_gram_form(Y, steps, restarts(len(steps), Y.dtype))
    return standard(Y, steps)
