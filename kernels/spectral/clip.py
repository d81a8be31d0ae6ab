"""Functions of the singular values that bound them: soft and hard clipping, and inverse square roots.

With ``d = c/‖X‖`` and ``S = d² I + X Xᵀ/‖X‖²``, soft clipping is ``d S^(-1/2) X``. S holds squares, so its
condition number is that of the stacked matrix ``[X/c; I]`` squared: where that asks for more than float32,
S is formed and inverted in float64 (CPU), or formed again from the stacked matrix on the way (elsewhere).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import rational, stacked
from .matrices import add_identity, frobenius, per_matrix, reciprocal, restore, wide
from .norm import start
from .products import gram

TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 1.2e-2, torch.float16: 5e-4}
"""Largest relative error of a singular value that is asked for, by dtype of the matrix."""

_LOOSE = 2.0**10
_POWER_STEPS = 8
_ROUNDING = 5
_INVERSES_FROM = 384
_SPLIT_EPS = 2.0**-18


def _power_of_two(norm: Tensor) -> Tensor:
    """A scale that brings the norm into [1, 2) without rounding anything; 1 for zero, NaN and infinity."""
    exponent = torch.frexp(norm).exponent
    scale = torch.ldexp(torch.ones_like(norm), 1 - exponent)
    return torch.where((norm > 0) & norm.isfinite(), scale, 1.0)


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
    """[batch] of bounds on the largest eigenvalue: power iteration with room, never above the norms."""
    v = start(G.shape[-1], G).expand(G.shape[0], -1, -1)
    for _ in range(_POWER_STEPS):
        v = torch.bmm(G, v)
        size = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        v = v / size.clamp(min=1e-30)
    sums = G.abs().sum(-1).amax(-1)
    return torch.minimum(1.25 * size.flatten(), torch.minimum(sums, frobenius(G).flatten())).double()


def _on_cpu(X: Tensor, U: Tensor, d: Tensor, scale: Tensor, tolerance: float) -> Tensor:
    """Soft clipping where looking at ratios costs nothing: matrices with similar ones are done together.

    Every matrix has the same result in any batch: what is chosen for it depends on its own ratio.
    """
    G = _fine_gram(U)
    ratio = (1 + _largest(G) / d.clamp(1e-7, _LOOSE).flatten() ** 2).sqrt()
    steps = (4 * ratio.log2()).ceil().clamp(min=1).nan_to_num(1.0)
    H = torch.empty_like(X)
    for step in steps.unique().tolist():
        chosen = (steps == step).nonzero().flatten()
        chosen = slice(None) if len(chosen) == len(X) else chosen
        part = X[chosen], U[chosen], G[chosen], d[chosen], scale[chosen]
        H[chosen] = _alike(*part, 2.0 ** (step / 4), tolerance)
    return H


def _alike(
    X: Tensor, U: Tensor, G: Tensor, d: Tensor, scale: Tensor, ratio: float, tolerance: float
) -> Tensor:
    """Inverses where float32 bears the squared condition number, and products where they cost less."""
    finest = tolerance * _ROUNDING / ratio**2
    small = G.shape[-1] < _INVERSES_FROM
    if G.dtype is torch.float32 and (small or torch.finfo(torch.float32).eps > finest):
        H = stacked.soft_clip(U, d, tolerance, ratio)
        return (H / scale.to(H.dtype)).to(X.dtype)
    if X.dtype is torch.bfloat16 and finest < _SPLIT_EPS:
        G = gram(U.float())
    top = (d.clamp(1e-7, _LOOSE) * ratio) ** 2
    S = add_identity(G / top.to(G.dtype), 1 / ratio**2)
    Q = rational.inverse_root(S, ratio, tolerance)
    return _fine_product(Q * (d.clamp(max=_LOOSE) / top.sqrt()).to(Q.dtype), X)


def soft_clip(X: Tensor, c: float | Tensor, tolerance: float | None = None, max_ratio: float = 1e4) -> Tensor:
    tolerance = TOLERANCE[X.dtype] if tolerance is None else tolerance
    Y, tall = wide(X)
    Y = Y.float() if Y.dtype is torch.float16 else Y
    norm = frobenius(Y)
    scale = _power_of_two(norm)
    good = norm.isfinite()
    U = torch.where(good, Y * scale.to(Y.dtype), 0.0)
    d = per_matrix(c, X) * scale
    if X.device.type == "cpu":
        H = _on_cpu(Y, U, d, scale, tolerance)
    else:
        H = stacked.soft_clip(U, d, tolerance, max_ratio) / scale
    return restore(torch.where(good, H, torch.nan), X, tall)


def hard_clip(X: Tensor, c: float | Tensor) -> Tensor:
    Y, tall = wide(X)
    norm = frobenius(Y)
    scale = _power_of_two(norm)
    good = norm.isfinite()
    d = per_matrix(c, X) * scale
    if X.device.type == "cpu":
        U = torch.where(good, Y.double() * scale, 0.0)
        values, vectors = torch.linalg.eigh(gram(U))
        kept = (d.squeeze(-1) / values.clamp(min=1e-300).sqrt()).clamp(max=1)
        Q = (vectors * kept.unsqueeze(-2)) @ vectors.mT
        H = Q.to(Y.dtype) @ Y if Y.dtype.itemsize >= 4 else Q.float() @ Y.float()
    else:
        U = torch.where(good, Y.to(torch.promote_types(Y.dtype, torch.float32)) * scale.to(torch.float32), 0.0)
        H = stacked.hard_clip(U, d) / scale
    return restore(torch.where(good, H, torch.nan), X, tall)


def inverse_sqrt(A: Tensor, ridge: float | None = None) -> Tensor:
    ridge = torch.finfo(A.dtype).eps if ridge is None else ridge
    R = A.reshape(-1, *A.shape[-2:])
    norm = frobenius(R)
    good = norm.isfinite()
    work = torch.float64 if R.device.type == "cpu" else torch.promote_types(R.dtype, torch.float32)
    R = torch.where(good, R.to(work) * reciprocal(norm, work), 0.0)
    R = (R + R.mT) / 2
    if R.device.type == "cpu":
        values, vectors = torch.linalg.eigh(R)
        Q = (vectors * (values.clamp(min=0) + ridge).rsqrt().unsqueeze(-2)) @ vectors.mT
    else:
        Q = stacked.inverse_root(add_identity(R, ridge), math.sqrt(ridge))
    Q = Q * reciprocal(norm, torch.float64).sqrt()
    Q = torch.where(norm > 0, Q, 0.0)
    return restore(torch.where(good, Q, torch.nan), A, tall=False)
