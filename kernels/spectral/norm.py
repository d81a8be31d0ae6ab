"""Spectral norms: Lanczos estimates from below, and bounds from above."""

# Matrices have the papers' capital letters.
# pyright: reportConstantRedefinition=false
from __future__ import annotations

import functools

import torch
from torch import Tensor

from .matrices import frobenius, reciprocal, wide
from .products import gram, polynomial

_SQUARINGS = 30


def start(size: int, like: Tensor) -> Tensor:
    """[1, size, 1] of numbers without structure, the same every time, made where they are needed."""
    make = _kept_noise if like.device.type == "cpu" else _noise
    return make(size, like.dtype, like.device)


def _noise(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    index = torch.arange(1, size + 1, device=device, dtype=torch.float64)
    noise = torch.frac(torch.sin(index * 12.9898) * 43758.5453)
    return (noise / torch.linalg.vector_norm(noise)).to(dtype).reshape(1, -1, 1)


_kept_noise = functools.lru_cache(maxsize=64)(_noise)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    length = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return x / length.clamp(min=torch.finfo(x.dtype).tiny), length


def largest_eigenvalue(T: Tensor) -> Tensor:
    """[batch] of small symmetric positive semidefinite matrices, by repeated squaring; never synchronises."""
    T, logarithm = T.double(), torch.zeros(T.shape[0], dtype=torch.float64, device=T.device)
    for i in range(_SQUARINGS + 1):
        size = torch.linalg.vector_norm(T, dim=(-2, -1), keepdim=True)
        logarithm += size.flatten().log() / 2**i
        T = T / size.clamp(min=1e-300)
        T = T @ T
    return logarithm.exp()


def estimate(X: Tensor, steps: int) -> Tensor:
    """Largest singular values of [batch, n, m], n >= m, from below, by Golub–Kahan–Lanczos steps."""
    steps = min(steps, *X.shape[-2:])
    v, _ = _unit(start(X.shape[-1], X).expand(X.shape[0], -1, -1))
    u, beta = torch.zeros_like(X[:, :, :1]), torch.zeros_like(X[:, :1, :1])
    B = X.new_zeros(X.shape[0], steps, steps)
    for i in range(steps):
        u, alpha = _unit(torch.bmm(X, v) - beta * u)
        v, beta = _unit(torch.bmm(X.mT, u) - alpha * v)
        B[:, i, i] = alpha.flatten()
        if i + 1 < steps:
            B[:, i, i + 1] = beta.flatten()
    return largest_eigenvalue(B @ B.mT).sqrt()


def bound(X: Tensor, squarings: int = 2) -> Tensor:
    """[batch] of upper bounds ``(tr (X Xᵀ)^k)^(1/2k)`` with ``k = 2^(squarings + 1)``."""
    A, logarithm = gram(X), torch.zeros(X.shape[0], 1, 1, dtype=torch.float64, device=X.device)
    for i in range(squarings + 1):
        size = frobenius(A)
        logarithm += size.log() / 2**i
        if i < squarings:
            A = polynomial(A * reciprocal(size, A.dtype), 0, 1)
    # Rounding may lower a bound that is reached.
    return (logarithm / 2).exp().flatten() * (1 + 8 * torch.finfo(X.dtype).eps * X.shape[-1] ** 0.5)


def spectral_norm(X: Tensor, steps: int, upper: bool) -> Tensor:
    Y, _ = wide(X)
    Y = Y if Y.dtype is torch.float64 else Y.float()
    size = frobenius(Y)
    scale = reciprocal(size, Y.dtype)
    Y = Y * scale
    found = bound(Y) if upper else estimate(Y.mT, steps)
    # A zero matrix has a logarithm of minus infinity on the way; a bad one is bad. Over the scale and not
    # times the norm: one over the smallest norms is no number of the dtype.
    found = torch.where(size.flatten() == 0, 0.0, found / scale.double().flatten())
    found = torch.where(size.flatten().isfinite(), found, torch.nan)
    return found.to(X.dtype).reshape(X.shape[:-2])
