"""What the spectral functions share: checks, orientation, and norms that neither overflow nor vanish."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 3.0e38


def check(X: Tensor, name: str = "X") -> None:
    """Refuses what is no batch of real matrices in floating point."""
    if not isinstance(X, Tensor):
        raise TypeError(f"{name}: got {type(X).__name__}; give a torch.Tensor")
    if not X.is_floating_point():
        raise TypeError(f"{name}: got dtype {X.dtype}; give a real floating-point tensor")
    if X.ndim < 2:
        raise ValueError(
            f"{name}: got shape {tuple(X.shape)}; give matrices, [..., rows, columns]: reshape or unsqueeze"
        )


def wide(X: Tensor) -> tuple[Tensor, bool]:
    """[batch, m, n] with m <= n, and whether that took a transposition."""
    tall = X.shape[-2] > X.shape[-1]
    flat = X.reshape(-1, *X.shape[-2:])
    return (flat.mT if tall else flat), tall


def restore(Y: Tensor, X: Tensor, tall: bool) -> Tensor:
    """Undoes ``wide`` and gives the result X's shape and dtype."""
    return (Y.mT if tall else Y).to(X.dtype).reshape(X.shape)


def frobenius(X: Tensor) -> Tensor:
    """[batch, 1, 1] in float64, where squares of float32 neither overflow nor vanish."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64)


def reciprocal(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the norm, finite for zero."""
    return norm.reciprocal().clamp(max=_LARGEST).to(dtype)
