"""Batched matrix products by whichever of torch's libraries is fastest for them.

On CPUs that are not Intel's, MKL multiplies float32 numbers with AVX2 whatever they have; oneDNN, which torch
brings as well, takes 0.45 of its time on an EPYC with AVX-512 (Zen 5, November 2026), and is as accurate.
"""

# Matrices have the papers' capital letters.
# pyright: reportConstantRedefinition=false
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Rows and columns from which one call per matrix takes less time than one for the batch.
_FROM = 192
_CPUINFO = Path("/proc/cpuinfo")


def _vendor() -> str:
    """The maker of this CPU as the kernel calls it, or nothing."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


@cache
def _onednn() -> Callable[..., Tensor] | None:
    """OneDNN's ``x wᵀ`` where it is faster than MKL's product."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return None
    if _vendor() in ("", "GenuineIntel"):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def by_onednn(rows: int, columns: int, device_type: str) -> bool:
    """Whether float32 matrices of this size are multiplied by oneDNN."""
    big = device_type == "cpu" and min(rows, columns) >= _FROM
    return big and torch.backends.mkldnn.enabled and _onednn() is not None


def _takes(A: Tensor, B: Tensor) -> bool:
    return A.dtype is torch.float32 and by_onednn(min(A.shape[-2:]), B.shape[-1], A.device.type)


def _product(A: Tensor, B: Tensor) -> Tensor:
    linear = _onednn()
    assert linear is not None
    # Of a part of a matrix oneDNN makes a thousand times as much work.
    B = B if B.is_contiguous() or B.mT.is_contiguous() else B.contiguous()
    return linear(A, B.mT, None, "none", [], "")


def _plus(product: Tensor, before: Tensor, beta: float, alpha: float) -> Tensor:
    product = product if alpha == 1 else product.mul_(alpha)
    # What is multiplied by zero may be memory that nobody wrote.
    return product.add_(before, alpha=beta) if beta else product


def multiply(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """``A B`` of [batch, m, k] and [batch, k, n]."""
    if not _takes(A, B):
        return torch.bmm(A, B) if out is None else torch.bmm(A, B, out=out)
    if out is None and len(A) == 1:
        return _product(A[0], B[0]).unsqueeze(0)
    out = A.new_empty(len(A), A.shape[1], B.shape[2]) if out is None else out
    for matrix, other, result in zip(A, B, out, strict=True):
        result.copy_(_product(matrix, other))
    return out


def multiply_add(
    C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    """``beta C + alpha A B`` of [batch, m, n], [batch, m, k] and [batch, k, n], or without the batch."""
    if not _takes(A, B):
        plain = torch.addmm if A.ndim == 2 else torch.baddbmm
        if out is None:
            return plain(C, A, B, beta=beta, alpha=alpha)
        return plain(C, A, B, beta=beta, alpha=alpha, out=out)
    if A.ndim == 2:
        found = _plus(_product(A, B), C, beta, alpha)
        return found if out is None else out.copy_(found)
    if out is None and len(A) == 1:
        return multiply_add(C[0], A[0], B[0], beta=beta, alpha=alpha).unsqueeze(0)
    out = torch.empty_like(C) if out is None else out
    for before, matrix, other, result in zip(C, A, B, out, strict=True):
        multiply_add(before, matrix, other, beta=beta, alpha=alpha, out=result)
    return out
