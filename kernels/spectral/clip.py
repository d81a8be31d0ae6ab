"""Functions of the singular values that bound them: soft and hard clipping, and inverse square roots.

With ``d = c/‖X‖`` and ``S = d² I + X Xᵀ/‖X‖²``, soft clipping is ``d S^(-1/2) X``. S holds squares, so its
condition number is that of the stacked matrix ``[X/c; I]`` squared: where that asks for more than float32,
S is formed in float64 and brought closer to the identity there (CPU), or formed again from the stacked matrix
on the way (elsewhere). Small matrices on a CPU go by eigenvalues in float64.
"""

# Matrices have the papers' capital letters.
# pyright: reportConstantRedefinition=false
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import blas, composition, stacked
from .composition import ROUNDING
from .matrices import add_identity, frobenius, per_matrix, reciprocal, restore, wide
from .norm import largest_bounds
from .products import gram

TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 1.2e-2, torch.float16: 5e-4}
"""Largest relative error of a singular value that is asked for, by dtype of the matrix."""

_LOOSE, _LOOSEST = 2.0**10, 2.0**26
# Below this share of the norm singular values are rounding; d may stay there.
_TIGHT = {torch.float64: 2.0**-26, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-20}
# Fourth powers of norms between 2^-24 and 2^24 stay in the range of float32, also spread over a matrix.
_NORMAL = 24
_MOST = {torch.float32: 2.0**126, torch.float64: 2.0**1022}
_SPLIT_EPS = 2.0**-18
# Rows up to which eigenvalues take less time than inverses: of any number of matrices, and of two at most.
_EIGENVALUES_TO, _FEW, _EIGENVALUES_OF_FEW_TO = 32, 2, 96
# Steps of an octave in which ratios are alike, for small and for large matrices: a group costs time, too.
_STEPS, _LARGE = (1, 4), 192


class Problem(NamedTuple):
    """``factor S^(-1/2) U`` with ``S = d² I + U Uᵀ`` for [batch, m, n] U; the others are [batch, 1, 1]."""

    U: Tensor
    d: Tensor
    factor: Tensor

    def of(self, chosen: Tensor) -> Problem:
        """Some of the matrices."""
        return Problem(*(part[chosen] for part in self))


def _scaled(Y: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y by a power of two where its norm is extreme, its norm then, and that power; rounds nothing."""
    mantissa, exponent = torch.frexp(norm)
    normal = (exponent.abs() < _NORMAL) | (norm == 0) | ~norm.isfinite()
    # Bounded, so that it is a number of the dtype; the smallest norms become normal all the same.
    most = _MOST.get(Y.dtype, _MOST[torch.float32])
    scale = torch.where(normal, 1.0, (mantissa / norm).clamp(1 / most, most))
    return Y * scale.to(Y.dtype), norm * scale, scale


def _bounds(c: float | Tensor, X: Tensor, norms: list[float], tight: float, loose: float) -> list[Tensor]:
    """Factor and d of matrices on a CPU, [batch, 1, 1]: by Python's numbers, which take less time."""
    given = per_matrix(c, X).flatten().tolist() if isinstance(c, Tensor) else [float(c)] * len(norms)
    rows: list[tuple[float, float]] = []
    for norm, bound in zip(norms, given, strict=True):
        size = norm or 1.0
        d = min(bound, loose * size)
        # A factor that is NaN makes the whole of a matrix NaN, and no other.
        rows.append((d if math.isfinite(norm) else math.nan, max(d, tight * size)))
    numbers = torch.tensor(rows, dtype=torch.float64, device="cpu").view(-1, 2)
    return [column.view(-1, 1, 1) for column in numbers.unbind(1)]


def _as_float32(Y: Tensor) -> bool:
    """Whether two products of bfloat16 parts take longer than one of float32."""
    m, n = Y.shape[-2:]
    small = Y.device.type == "cpu" and m < _LARGE
    return Y.dtype is torch.bfloat16 and (small or blas.by_onednn(m, n, Y.device.type))


def _problem(X: Tensor, c: float | Tensor, tolerance: float) -> tuple[Problem, Tensor | None, bool]:
    """Also what its results are multiplied with at the end, if anything; and whether X is tall."""
    Y, tall = wide(X)
    Y = Y.float() if Y.dtype is torch.float16 or _as_float32(Y) else Y
    norm, tight = frobenius(Y), _TIGHT[Y.dtype]
    # A bound so far above the norm changes less than is asked for.
    loose = min(max(_LOOSE, tolerance**-0.5), _LOOSEST)
    if Y.device.type == "cpu":
        norms = norm.flatten().tolist()
        if all(abs(math.frexp(each)[1]) < _NORMAL for each in norms):
            factor, d = _bounds(c, X, norms, tight, loose)
            return Problem(Y, d, factor), None, tall
    U, norm, scale = _scaled(Y, norm)
    size = torch.where(norm > 0, norm, 1.0)
    d = per_matrix(c, X) * scale
    d = torch.minimum(d, loose * size)
    least = torch.maximum(d, tight * size)
    factor, rest = torch.where(norm.isfinite(), least, torch.nan), d / least / scale
    if X.device.type != "cpu":
        return Problem(U, least, factor * rest), None, tall
    return Problem(U, least, factor), rest, tall


def _times(H: Tensor, factor: Tensor | None) -> Tensor:
    """Last of all: bfloat16 products on a CPU take the smallest numbers for zeros."""
    return H if factor is None else H * factor.to(torch.promote_types(H.dtype, torch.float32))


def _fine_gram(X: Tensor) -> Tensor:
    """``X Xᵀ`` in float32 from bfloat16 products: what the first one rounds off, the second one finds."""
    if X.dtype is not torch.bfloat16:
        return gram(X)
    high = blas.multiply(X, X.mT)
    low = blas.multiply_add(high, X, X.mT, beta=-1)
    return high.float().add_(low)


def _fine_product(Q: Tensor, X: Tensor) -> Tensor:
    """``Q X``; a bfloat16 X is multiplied by two bfloat16 parts of Q."""
    if X.dtype is not torch.bfloat16:
        return blas.multiply(Q.to(X.dtype), X)
    high = Q.bfloat16()
    low = (Q - high).bfloat16()
    return blas.multiply_add(blas.multiply(low, X), high, X)


def _on_cpu(given: Problem, tolerance: float) -> Tensor:
    """Soft clipping where looking at ratios costs nothing: matrices with similar ones are done together.

    What is chosen for a matrix depends on its own ratio, and on their number if they are small.
    """
    G = _fine_gram(given.U)
    bounds = zip(largest_bounds(G), given.d.flatten().tolist(), strict=True)
    squares = [bound / d**2 for bound, d in bounds]
    groups: dict[int, list[int]] = {}
    fine = _STEPS[G.shape[-1] >= _LARGE]
    for index, square in enumerate(squares):
        step = max(math.ceil(fine / 2 * math.log2(1 + square)), 1) if square > tolerance else 0
        groups.setdefault(step if math.isfinite(square) else -1, []).append(index)
    if len(groups) == 1:
        return _alike(given, G, next(iter(groups)), tolerance)
    H = torch.empty_like(given.U)
    for step, members in groups.items():
        chosen = torch.tensor(members, dtype=torch.long, device="cpu")
        H[chosen] = _alike(given.of(chosen), G[chosen], step, tolerance)
    return H


def _alike(given: Problem, G: Tensor, step: int, tolerance: float) -> Tensor:
    """Matrices with ratios in one step; steps below one are exceptions."""
    if step < 1:
        return given.U * (given.factor / given.d if step == 0 else torch.nan * given.d).to(given.U.dtype)
    ratio = 2.0 ** (step / _STEPS[G.shape[-1] >= _LARGE])
    finest = tolerance * ROUNDING / ratio**2
    if torch.finfo(torch.float32).eps > finest:
        G = gram(given.U.double())
    elif given.U.dtype is torch.bfloat16 and finest < _SPLIT_EPS:
        G = gram(given.U.float())
    top = (given.d * ratio) ** 2
    S = add_identity(G / top.to(G.dtype), 1 / ratio**2)
    Q = composition.inverse_root(S, ratio, tolerance, torch.promote_types(given.U.dtype, torch.float32))
    return _fine_product(Q.mul_((given.factor / top.sqrt()).to(Q.dtype)), given.U)


def _by_eigenvalues(X: Tensor, c: float | Tensor) -> Tensor:
    """Small matrices, whatever their ratio, in float64, where squares of float32 keep their range."""
    Y, tall = wide(X)
    V = Y.double()
    G = blas.multiply(V, V.mT)
    norms = G.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().tolist()
    factor, d = _bounds(c, X, norms, _TIGHT[torch.float32], _LOOSE**2)
    for index, norm in enumerate(norms):
        if not math.isfinite(norm):
            G[index] = 0.0
    values, vectors = torch.linalg.eigh(G)
    root = values.clamp_(min=0).unsqueeze(-2).add(d**2).rsqrt_().mul_(factor)
    Q = blas.multiply(vectors * root, vectors.mT)
    return restore(blas.multiply(Q, V), X, tall)


def soft_clip(X: Tensor, c: float | Tensor, tolerance: float | None = None, max_ratio: float = 1e4) -> Tensor:
    on_cpu = X.device.type == "cpu"
    few = math.prod(X.shape[:-2]) <= _FEW
    small = min(X.shape[-2:]) <= (_EIGENVALUES_OF_FEW_TO if few else _EIGENVALUES_TO)
    if on_cpu and small and X.dtype is not torch.float64:
        return _by_eigenvalues(X, c)
    tolerance = TOLERANCE[X.dtype] if tolerance is None else tolerance
    given, rest, tall = _problem(X, c, tolerance)
    if on_cpu:
        return restore(_times(_on_cpu(given, tolerance), rest), X, tall)
    return restore(stacked.soft_clip(*given, tolerance, max_ratio), X, tall)


def hard_clip(X: Tensor, c: float | Tensor) -> Tensor:
    given, rest, tall = _problem(X, c, TOLERANCE[X.dtype])
    if X.device.type != "cpu":
        return restore(stacked.hard_clip(*given), X, tall)
    U, d, factor = given
    G = gram(U.double())
    values, vectors = torch.linalg.eigh(torch.where(factor.isfinite(), G, 0.0))
    kept = factor / torch.maximum(values.clamp(min=0).sqrt().unsqueeze(-2), d)
    Q = blas.multiply(vectors * kept, vectors.mT)
    H = _fine_product(Q.to(torch.promote_types(U.dtype, torch.float32)), U)
    return restore(_times(H, rest), X, tall)


def inverse_sqrt(A: Tensor, ridge: float | None = None) -> Tensor:
    ridge = torch.finfo(A.dtype).eps if ridge is None else ridge
    R = A.reshape(-1, *A.shape[-2:])
    norm = frobenius(R)
    on_cpu = R.device.type == "cpu"
    work = torch.float64 if on_cpu else torch.promote_types(R.dtype, torch.float32)
    R = torch.where(norm.isfinite(), R.to(work) * reciprocal(norm, work), 0.0)
    R = (R + R.mT) / 2
    if on_cpu:
        values, vectors = torch.linalg.eigh(R)
        Q = blas.multiply(vectors * (values.clamp(min=0) + ridge).rsqrt().unsqueeze(-2), vectors.mT)
    else:
        Q = stacked.inverse_root(add_identity(R, ridge), math.sqrt(ridge))
    scale = torch.where(norm > 0, norm.rsqrt(), 0.0)
    return restore(Q * torch.where(norm.isfinite(), scale, torch.nan).to(work), A, tall=False)
