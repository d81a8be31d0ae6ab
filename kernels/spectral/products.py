"""The three products of Newton–Schulz: ``X Xᵀ``, ``b A + c A²`` and ``a X + B X``, batched."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _on_triton(X: Tensor) -> bool:
    return X.is_cuda and _TRITON and X.dtype in _DTYPES


def gram(X: Tensor, out: Tensor | None = None) -> Tensor:
    """``X Xᵀ``."""
    if _on_triton(X):
        from ..triton import products

        return products.gram(X, out)
    return torch.matmul(X, X.mT, out=out)


def polynomial(A: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    """``b A + c A²`` of symmetric A."""
    if _on_triton(A):
        from ..triton import products

        return products.polynomial(A, b, c, out)
    return torch.baddbmm(A, A, A, beta=b, alpha=c, out=out)


def multiply_add(X: Tensor, B: Tensor, a: float, out: Tensor | None = None) -> Tensor:
    """``a X + B X`` with symmetric B."""
    if _on_triton(X):
        from ..triton import products

        return products.multiply_add(X, B, a, out)
    return torch.baddbmm(X, B, X, beta=a, out=out)
