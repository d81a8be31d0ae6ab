"""Functions of singular values: orthogonalisation, clipping, norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .kernels.spectral import clip, newton_schulz, norm
from .kernels.spectral.coefficients import schedule
from .kernels.spectral.matrices import check, check_bound, frobenius, reciprocal, restore, wide

__all__ = ["hard_clip", "inverse_sqrt", "orthogonalize", "soft_clip", "spectral_norm"]


def orthogonalize(
    X: Tensor,
    coefficients: str | Sequence[Sequence[float]] = "polar_express",
    steps: int = 5,
    *,
    form: Literal["auto", "standard", "gram"] = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The nearest orthogonal matrices."""
    check(X)
    plan = schedule(coefficients, steps)
    if form not in ("auto", "standard", "gram"):
        raise ValueError(f"form: got {form!r}; give 'auto', 'standard' or 'gram'")
    Y, tall = wide(X)
    scale = reciprocal(frobenius(Y) * plan.margin, torch.float32)
    Y = (Y * scale).to(torch.bfloat16 if dtype is None else dtype)
    return restore(newton_schulz.orthogonalize(Y, plan.steps, form), X, tall)


def soft_clip(X: Tensor, c: float | Tensor) -> Tensor:
    """``X (I + XᵀX/c²)^(-1/2)``."""
    check(X)
    check_bound(c, X)
    return clip.soft_clip(X, c)


def hard_clip(X: Tensor, c: float | Tensor) -> Tensor:
    """Every singular value becomes ``min(σ, c)``."""
    check(X)
    check_bound(c, X)
    return clip.hard_clip(X, c)


def inverse_sqrt(A: Tensor) -> Tensor:
    """``A^(-1/2)`` of symmetric positive definite matrices."""
    check(A, "A")
    return clip.inverse_sqrt(A)


def spectral_norm(X: Tensor) -> Tensor:
    """The largest singular values."""
    check(X)
    return norm.spectral_norm(X)
