"""Functions of the singular values that bound them: soft and hard clipping, inverse square root."""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import schedule
from .matrices import frobenius, reciprocal, restore, wide
from .newton_schulz import inverse_root


def _inverse_sqrt(A: Tensor) -> Tensor:
    """float64 [batch, m, m], by eigenvalues."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT


def _bound(c: float | Tensor, X: Tensor) -> Tensor:
    return torch.as_tensor(c, dtype=torch.float64, device=X.device).reshape(-1, 1, 1)


def soft_clip(X: Tensor, c: float | Tensor) -> Tensor:
    Y, tall = wide(X)
    Y = Y.double() / _bound(c, X)
    A = Y @ Y.mT
    A.diagonal(dim1=-2, dim2=-1).add_(1)
    bad = ~A.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    Q = _inverse_sqrt(torch.where(bad, 1.0, A))
    H = torch.where(bad, torch.nan, Q @ Y) * _bound(c, X)
    return restore(H, X, tall)


def hard_clip(X: Tensor, c: float | Tensor) -> Tensor:
    Y, tall = wide(X)
    Y = Y.double() / _bound(c, X)
    A = Y @ Y.mT
    bad = ~A.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(bad, 1.0, A))
    Q = (vectors * values.clamp(min=1).rsqrt().unsqueeze(-2)) @ vectors.mT
    H = torch.where(bad, torch.nan, Q @ Y) * _bound(c, X)
    return restore(H, X, tall)


def inverse_sqrt(A: Tensor) -> Tensor:
    R = A.reshape(-1, *A.shape[-2:]).double()
    scale = reciprocal(frobenius(R), torch.float64)
    Q = inverse_root(R * scale, schedule("polar_express", 12).steps)
    return restore(Q * scale.sqrt(), A, tall=False)
