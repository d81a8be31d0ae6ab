"""Functions of the singular values that bound them: soft and hard clipping, and inverse square roots.

With ``d = c/‖X‖`` and ``S = d² I + X Xᵀ/‖X‖²``, soft clipping is ``d S^(-1/2) X``. S holds squares, so its
condition number is that of the stacked matrix ``[X/c; I]`` squared: where that asks for more than float32,
S is formed and inverted in float64 (CPU), or formed again from the stacked matrix on the way (elsewhere).
"""

# Matrices have the papers' capital letters.
# pyright: reportConstantRedefinition=false
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import rational, stacked
from .matrices import add_identity, frobenius, per_matrix, reciprocal, restore, wide
from .norm import start
from .products import gram

TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 1.2e-2, torch.float16: 5e-4}
"""Largest relative error of a singular value that is asked for, by dtype of the matrix."""

_LOOSE = 2.0**10
# Below this share of the norm singular values are rounding; d may stay there.
_TIGHT = {torch.float64: 2.0**-26, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-20}
_POWER_STEPS = 7
_NORMAL = 40
_EXTREME = 2e4
_ROUNDING = 4
_SPLIT_EPS = 2.0**-18
# Rows from which inverses take less time than products (two cores, November 2026).
_INVERSES_FROM = {torch.bfloat16: 192, torch.float32: 384, torch.float64: 1}


class Problem(NamedTuple):
    """``factor S^(-1/2) U`` with ``S = d² I + U Uᵀ`` for [batch, m, n] U; the others are [batch, 1, 1]."""

    U: Tensor
    d: Tensor
    factor: Tensor

    def of(self, chosen: Tensor) -> Problem:
        """Some of the matrices."""
        return Problem(*(part[chosen] for part in self))


def _scaled(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y by a power of two where its norm is extreme, its norm then, and that power; rounds nothing."""
    norm = frobenius(Y)
    exponent = torch.frexp(norm).exponent
    normal = (exponent.abs() < _NORMAL) | (norm == 0) | ~norm.isfinite()
    scale = torch.where(normal, 1.0, torch.ldexp(torch.ones_like(norm), -exponent))
    if Y.device.type != "cpu" or not bool(normal.all()):
        Y = Y * scale.to(Y.dtype)
    return Y, norm * scale, scale


def _problem(X: Tensor, c: float | Tensor) -> tuple[Problem, bool]:
    Y, tall = wide(X)
    U, norm, scale = _scaled(Y.float() if Y.dtype is torch.float16 else Y)
    size = torch.where(norm > 0, norm, 1.0)
    d = per_matrix(c, X) * scale
    d = torch.minimum(d, _LOOSE * size)
    # A factor that is NaN makes the whole of a matrix NaN, and no other.
    factor = torch.where(norm.isfinite(), d / scale, torch.nan)
    return Problem(U, torch.maximum(d, _TIGHT[U.dtype] * size), factor), tall


def _fine_gram(X: Tensor) -> Tensor:
    """``X Xᵀ`` in float32 from bfloat16 products: what the first one rounds off, the second one finds."""
    if X.dtype is not torch.bfloat16:
        return gram(X)
    high = torch.bmm(X, X.mT)
    low = torch.baddbmm(high, X, X.mT, beta=-1)
    return high.float().add_(low)


def _fine_product(Q: Tensor, X: Tensor) -> Tensor:
    """``Q X``; a bfloat16 X is multiplied by two bfloat16 parts of Q."""
    if X.dtype is not torch.bfloat16:
        return torch.bmm(Q.to(X.dtype), X)
    high = Q.bfloat16()
    low = (Q - high).bfloat16()
    return torch.baddbmm(torch.bmm(low, X), high, X)


def _largest(G: Tensor) -> Tensor:
    """[batch, 1, 1] of the largest eigenvalues or a little more, by power iteration; never above a norm."""
    v = torch.bmm(G, start(G.shape[-1], G).expand(G.shape[0], -1, -1))
    for _ in range(_POWER_STEPS):
        v = torch.bmm(G, v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp(min=1e-30))
    size = 1.25 * torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    return torch.minimum(size, G.abs().sum(-1, keepdim=True).amax(-2, keepdim=True)).double()


def _on_cpu(given: Problem, tolerance: float) -> Tensor:
    """Soft clipping where looking at ratios costs nothing: matrices with similar ones are done together.

    What is chosen for a matrix depends on its own ratio alone.
    """
    G = _fine_gram(given.U)
    ratio = (1 + _largest(G) / given.d**2).sqrt().flatten()
    steps = (4 * ratio.log2()).ceil().clamp(min=1).nan_to_num(-1.0)
    steps[ratio**2 - 1 <= tolerance] = 0
    groups = steps.unique().tolist()
    if len(groups) == 1:
        return _alike(given, G, groups[0], tolerance)
    H = torch.empty_like(given.U)
    for step in groups:
        chosen = (steps == step).nonzero().flatten()
        H[chosen] = _alike(given.of(chosen), G[chosen], step, tolerance)
    return H


def _alike(given: Problem, G: Tensor, step: float, tolerance: float) -> Tensor:
    """Inverses where they bear the squared condition number, or products; steps below one are exceptions."""
    if step < 1:
        return given.U * (given.factor / given.d if step == 0 else torch.nan * given.d).to(given.U.dtype)
    ratio = 2.0 ** (step / 4)
    finest = tolerance * _ROUNDING / ratio**2
    few = G.shape[-1] < _INVERSES_FROM[given.U.dtype]
    if ratio > _EXTREME:
        G = gram(given.U.double())
    elif G.dtype is torch.float32 and (few or torch.finfo(torch.float32).eps > finest):
        return stacked.soft_clip(*given, G, tolerance, ratio)
    elif given.U.dtype is torch.bfloat16 and finest < _SPLIT_EPS:
        G = gram(given.U.float())
    top = (given.d * ratio) ** 2
    S = add_identity(G / top.to(G.dtype), 1 / ratio**2)
    Q = rational.inverse_root(S, ratio, tolerance)
    return _fine_product(Q.mul_((given.factor / top.sqrt()).to(Q.dtype)), given.U)


def soft_clip(X: Tensor, c: float | Tensor, tolerance: float | None = None, max_ratio: float = 1e4) -> Tensor:
    tolerance = TOLERANCE[X.dtype] if tolerance is None else tolerance
    given, tall = _problem(X, c)
    if X.device.type == "cpu":
        return restore(_on_cpu(given, tolerance), X, tall)
    return restore(stacked.soft_clip(*given, None, tolerance, max_ratio), X, tall)


def hard_clip(X: Tensor, c: float | Tensor) -> Tensor:
    given, tall = _problem(X, c)
    U, d, factor = given
    if X.device.type != "cpu":
        return restore(stacked.hard_clip(*given), X, tall)
    G = gram(U.double())
    values, vectors = torch.linalg.eigh(torch.where(factor.isfinite(), G, 0.0))
    kept = factor / torch.maximum(values.clamp(min=0).sqrt().unsqueeze(-2), d)
    Q = torch.bmm(vectors * kept, vectors.mT)
    return restore(_fine_product(Q.to(torch.promote_types(U.dtype, torch.float32)), U), X, tall)


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
        Q = torch.bmm(vectors * (values.clamp(min=0) + ridge).rsqrt().unsqueeze(-2), vectors.mT)
    else:
        Q = stacked.inverse_root(add_identity(R, ridge), math.sqrt(ridge))
    scale = torch.where(norm > 0, norm.rsqrt(), 0.0)
    return restore(Q * torch.where(norm.isfinite(), scale, torch.nan).to(work), A, tall=False)
