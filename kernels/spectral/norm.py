"""Spectral norms: Lanczos estimates from below, and bounds from above."""

# Matrices have the papers' capital letters.
# pyright: reportConstantRedefinition=false
from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from .matrices import add_identity, frobenius, reciprocal, wide
from .products import gram, multiplies_bfloat16, polynomial

_SQUARINGS = 30
# Squares of a centred Gram matrix. For a Gaussian X of 1024 x 1024 one leaves a bound of 1.45 times its norm,
# two 1.17, three 1.08; in bfloat16 three take 11 ms, in float32 two 20 ms (two cores, November 2026).
_CENTRED = {torch.bfloat16: 3, torch.float32: 2}
# Rows from which iterates that may save squares take less time, as do squares in bfloat16 on CPUs for it.
_GUESSED_FROM = 256
_GUESSES = 5
# Of eigenvalues, up to which another square takes longer than what a ratio nearer by its root saves.
_NEAR = 2.6
# What a product rounds off, relative to Frobenius norms: float32 sums of some thousand terms are far below.
_ROUNDED = 1e-4
_TINY = 1e-30
_UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-18}


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


def _from_below(C: Tensor) -> Tensor:
    """[batch, 1, 1] of growths by ``I + C`` along the iterates of a fixed start."""
    before = start(C.shape[-1], C).expand(C.shape[0], -1, -1)
    for _ in range(_GUESSES - 1):
        before = before + torch.bmm(C, before)
    after = before + torch.bmm(C, before)
    lengths = [torch.linalg.vector_norm(v, dim=-2, keepdim=True).double() for v in (after, before)]
    return lengths[0] / lengths[1]


def _by_powers(C: Tensor) -> list[float]:
    """Bounds of the growth by ``I + C`` of small C, whose fourth powers are numbers of float32.

    In Python's numbers, because each of torch's takes longer than these matrices' products.
    """
    powers, unit = [C], _UNIT[torch.float32]
    for _ in range(_CENTRED[torch.float32]):
        powers.append(polynomial(powers[-1], 0, 1))
    found: list[float] = []
    for lengths in torch.stack([torch.linalg.vector_norm(P, dim=(-2, -1)) for P in powers], 1).tolist():
        sizes = [after / (before**2 or _TINY) for before, after in itertools.pairwise(lengths)]
        top = sizes.pop() * (1 + unit)
        for size in (*reversed(sizes), lengths[0]):
            # The root of the norm of a square, and what was rounded before it was squared.
            top = size * (math.sqrt(top) + 2 * unit)
        found.append(1 + top)
    return found


def _by_squares(C: Tensor) -> list[float]:
    """The same of larger C, with as many squares as a bound near enough asks for."""
    work = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    unit, near = _UNIT[work], _NEAR * _from_below(C)
    sizes: list[Tensor] = []
    found = torch.full_like(near, math.inf)
    for left in reversed(range(_CENTRED[work] + 1)):
        size = torch.linalg.vector_norm(C, dim=(-2, -1), keepdim=True, dtype=torch.float32)
        top = size.double() * (1 + unit)
        for before in reversed(sizes):
            top = before * (top.sqrt() + 2 * unit)
        sizes.append(size.double())
        # Every matrix has the first bound that is near enough, whatever others need.
        found = torch.where(found <= near, found, 1 + top)
        if not left or bool((found <= near).all()):
            break
        C = (C / size.clamp(min=_TINY)).to(work)
        # Symmetric but for rounding: a transposed operand would take twice the time.
        C = torch.bmm(C, C) if work is torch.bfloat16 else polynomial(C, 0, 1)
    return found.flatten().tolist()


def largest_bounds(G: Tensor) -> list[float]:
    """Upper bounds of the largest eigenvalues of semidefinite [batch, m, m], on a CPU.

    ``mean + ‖(G - mean I)^k‖^(1/k)`` in the Frobenius norm, k up to 4 or 8, and what the products round off.
    Power iteration says only when a bound is near enough: it misses what is orthogonal to its start.
    """
    mean = G.diagonal(dim1=-2, dim2=-1).mean(-1)
    C = add_identity((G / mean.clamp(min=_TINY).view(-1, 1, 1)).float(), -1.0)
    growth = _by_powers(C) if C.shape[-1] < _GUESSED_FROM else _by_squares(C)
    return [size * found * (1 + _ROUNDED) for size, found in zip(mean.tolist(), growth, strict=True)]


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
