"""Clipping by matrix products alone, for devices where factorisations are slow: no host synchronisation.

Soft clipping is the upper block of the polar factor of ``[U; d I]``. Its iterates are ``[U_k; P_k]`` with
``P_k`` a polynomial of ``U Uᵀ``; the Gram matrix ``U_k U_kᵀ + P_k²`` is formed anew before its square of the
condition number hurts. The polynomials are the best for the interval, looked up on the device.
"""

# Matrices have the papers' capital letters.
# pyright: reportConstantRedefinition=false
from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from . import blas
from .coefficients import optimal
from .matrices import add_identity, frobenius, reciprocal
from .products import gram, multiply_add, polynomial

_ROWS = 36
# Steps that begin with a new Gram matrix, from the ratio on where rounding asks for it.
_RESTARTS = {2: 32.0, 4: 100.0}


@functools.lru_cache(maxsize=64)
def steps_for(ratio: float, tolerance: float) -> int:
    """Steps after which singular values in [1/ratio, 1] are one within the tolerance."""
    for steps in range(1, 16):
        if optimal(1 / ratio, steps)[1] <= tolerance:
            return steps
    return 16


@functools.lru_cache(maxsize=64)
def _table(steps: int, device: torch.device) -> Tensor:
    """[rows, steps, 3]: row k serves singular values from 2^(-k/2) to 1."""
    rows = [optimal(0.5 ** (k / 2), steps)[0] for k in range(_ROWS)]
    return torch.tensor(rows, dtype=torch.float64).to(device)


def _scaled(R: Tensor, lower: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R and R², divided by a bound; the root of one over it; coefficients [batch, steps, 3, 1, 1]."""
    square = polynomial(R, 0, 1)
    sums = square.abs().sum(-1).amax(-1).sqrt().reshape(-1, 1, 1)
    top = torch.minimum(frobenius(square).sqrt(), sums.double()) * (1 + 1e-5)
    octave = (2 * (top.sqrt() / lower).log2()).ceil().clamp(0, _ROWS - 1).nan_to_num(0.0).long().flatten()
    table = _table(steps, R.device)[octave].to(R.dtype).reshape(-1, steps, 3, 1, 1)
    scale = top.reciprocal().to(R.dtype)
    return R * scale, square * scale**2, scale.sqrt(), table


def _segment(R: Tensor, square: Tensor | None, table: Tensor) -> Tensor:
    """Q with ``Q R Q`` nearer to the identity, by the polynomials of the table."""
    Q = None
    for i, (a, b, c) in enumerate(step.unbind(1) for step in table.unbind(1)):
        square = polynomial(R, 0, 1) if square is None else square
        Z = add_identity(torch.addcmul(b * R, c, square), a)
        square = None
        if i + 1 < table.shape[1]:
            R = blas.multiply(Z, blas.multiply(R, Z))
        Q = Z if Q is None else blas.multiply(Q, Z)
    assert Q is not None
    return Q


def soft_clip(U: Tensor, d: Tensor, factor: Tensor, tolerance: float, max_ratio: float) -> Tensor:
    """``factor (d² I + U Uᵀ)^(-1/2) U``; the factors are [batch, 1, 1]."""
    given, U = U.dtype, U.to(torch.promote_types(U.dtype, torch.float32))
    small = d.to(U.dtype)
    # The bound on the norm is at most m^(1/8) times it, and its row serves up to 1.4 times that.
    steps = steps_for(2 * max_ratio, tolerance)
    R, square, scale, table = _scaled(add_identity(gram(U), small**2), d, steps)
    cuts = [0, *(i for i, least in _RESTARTS.items() if i < steps and max_ratio > least), steps]
    Q = _segment(R, square, table[:, : cuts[1]]).mul_(scale)
    P = Q * small
    for begin, end in itertools.pairwise(cuts[1:]):
        U = blas.multiply(Q, U)
        Q = _segment(gram(U) + gram(P), None, table[:, begin:end])
        if end < steps:
            P = blas.multiply(Q, P)
    return blas.multiply(Q * factor.to(Q.dtype), U).to(given)


def inverse_root(S: Tensor, lower: float) -> Tensor:
    """``S^(-1/2)`` of symmetric matrices with eigenvalues from ``lower²`` to about one."""
    bound = torch.full_like(S[:, :1, :1], lower, dtype=torch.float64)
    R, square, scale, table = _scaled(S, bound, steps_for(2 / lower, 1e-6))
    Q = _segment(R, square, table[:, :2])
    for begin in range(2, table.shape[1], 2):
        nearer = blas.multiply(blas.multiply(Q, R), Q)
        Q = blas.multiply(_segment(nearer, None, table[:, begin : begin + 2]), Q)
    return Q * scale


def _sign(X: Tensor) -> Tensor:
    """The polar factor of [batch, m, n]; singular values below 1e-5 of the norm fall short of one."""
    X = X * reciprocal(frobenius(X), X.dtype)
    for a, b, c in optimal(1e-5, steps_for(1e5, 1e-6))[0]:
        A = gram(X)
        X = multiply_add(X, polynomial(A, b, c), a)
    return X


def hard_clip(U: Tensor, d: Tensor, factor: Tensor) -> Tensor:
    """``min(σ, d)`` by ``2 min(σ, d) = σ + d - |σ - d|``, times ``factor/d``."""
    given, U = U.dtype, U.to(torch.promote_types(U.dtype, torch.float32))
    # Above the norm d changes nothing.
    low = torch.minimum(d, frobenius(U))
    bound, polar = low.to(U.dtype), _sign(U)
    D = add_identity(-blas.multiply(U, polar.mT), bound)
    D = (D + D.mT) / 2
    H = bound * polar + U - blas.multiply(blas.multiply(D, _sign(D)), polar)
    return (H * (factor / d / 2).to(U.dtype)).to(given)
