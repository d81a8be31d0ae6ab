"""The products of Newton–Schulz: ``X Xᵀ``, ``b A + c A²``, ``a X + B X`` and ``a A + A B``, in batches.

On a CPU with AMX one batched call serves bfloat16: on two cores it takes half the time of a loop over
matrices of 1024 × 1024, and computing one triangle saves nothing there, because AMX repacks its operand for
every block. Other CPUs take one matrix after another, so that what belongs to it stays in the caches (0.9 of
the batch's time), and one triangle (0.65 of the product's time for 1024 × 4096, 0.77 for 1024 × 1024). So
does float32 everywhere, in 0.74, and float64 in smaller panels, 0.65 for 512 × 2048 (all measured in
November 2026).
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from . import blas

_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PANEL, _FINE_PANEL = 256, 128
_TRIANGLE_FROM, _FINE_TRIANGLE_FROM = 768, 256
_ALONE_FROM = 512


def _on_triton(X: Tensor) -> bool:
    return X.is_cuda and _TRITON and X.dtype in _TRITON_DTYPES


@cache
def has_amx() -> bool:
    """Whether the CPU multiplies tiles of 16-bit numbers; not if torch cannot say."""
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 numbers faster than float32; not if torch cannot say."""
    return has_amx() or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def _in_tiles(dtype: torch.dtype) -> bool:
    return dtype.itemsize < 4 and has_amx()


def by_triangle(m: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether a symmetric m × m result is computed in one triangle and mirrored."""
    if device_type == "cuda":
        return _TRITON and dtype in _TRITON_DTYPES
    least = _FINE_TRIANGLE_FROM if dtype is torch.float64 else _TRIANGLE_FROM
    return device_type == "cpu" and not _in_tiles(dtype) and m >= least


def _panel(dtype: torch.dtype) -> int:
    return _FINE_PANEL if dtype is torch.float64 else _PANEL


def one_by_one(m: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether a batch of matrices with m rows takes longer than one matrix after another."""
    return device_type == "cpu" and not _in_tiles(dtype) and m >= _ALONE_FROM


def _triangle(L: Tensor, R: Tensor, A: Tensor | None, b: float, c: float, out: Tensor) -> Tensor:
    """``b A + c L R``, symmetric but for rounding, by panels of the lower triangle."""
    panel = _panel(out.dtype)
    for i in range(out.shape[0]):
        for begin in range(0, out.shape[-1], panel):
            end = min(begin + panel, out.shape[-1])
            rows, columns, target = L[i, begin:end], R[i, :, :end], out[i, begin:end, :end]
            added = target if A is None else A[i, begin:end, :end]
            blas.multiply_add(added, rows, columns, beta=b, alpha=c, out=target)
            out[i, :begin, begin:end] = target[:, :begin].mT
    return out


def gram(X: Tensor, out: Tensor | None = None) -> Tensor:
    """``X Xᵀ`` of [batch, m, n]."""
    if _on_triton(X):
        from ..triton import products

        return products.gram(X, out)
    m = X.shape[-2]
    if by_triangle(m, X.dtype, X.device.type):
        out = X.new_empty(X.shape[0], m, m) if out is None else out
        return _triangle(X, X.mT, None, 0, 1, out)
    return blas.multiply(X, X.mT, out)


def polynomial(A: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    """``b A + c A²`` of symmetric [batch, m, m]."""
    if _on_triton(A):
        from ..triton import products

        return products.polynomial(A, b, c, out)
    if by_triangle(A.shape[-1], A.dtype, A.device.type):
        return _triangle(A, A, A, b, c, torch.empty_like(A) if out is None else out)
    return blas.multiply_add(A, A, A, beta=b, alpha=c, out=out)


def multiply_add(X: Tensor, B: Tensor, a: float, out: Tensor | None = None) -> Tensor:
    """``a X + B X`` of [batch, m, n] and symmetric [batch, m, m]."""
    if _on_triton(X):
        from ..triton import products

        return products.multiply_add(X, B, a, out)
    return blas.multiply_add(X, B, X, beta=a, out=out)


def multiply_commuting(A: Tensor, B: Tensor, a: float) -> Tensor:
    """``a A + A B`` of symmetric [batch, m, m] that commute, so that it is symmetric as well."""
    if _on_triton(A):
        from ..triton import products

        return products.multiply_commuting(A, B, a)
    if by_triangle(A.shape[-1], A.dtype, A.device.type):
        return _triangle(A, B, A, a, 1, torch.empty_like(A))
    return multiply_add(A, B, a)


def triangle_share(m: int, dtype: torch.dtype) -> float:
    """The part of a symmetric product that is computed, with panels of rows."""
    ends = [min(begin + _panel(dtype), m) for begin in range(0, m, _panel(dtype))]
    return sum((end - begin) * end for begin, end in zip([0, *ends], ends, strict=False)) / m**2
