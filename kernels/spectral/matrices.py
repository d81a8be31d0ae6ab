"""What the spectral functions share: checks, orientation, and norms that neither overflow nor vanish."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SAFE = {torch.float32: (1e-15, 1e15), torch.float64: (1e-140, 1e140)}


def check(X: object, name: str = "X", square: bool = False) -> None:
    """Refuses what is no batch of real matrices in floating point."""
    if not isinstance(X, Tensor):
        raise TypeError(f"{name}: got {type(X).__name__}; give a torch.Tensor")
    if X.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(
            f"{name}: got dtype {X.dtype}; give float32, bfloat16, float16 or float64: convert with .to()"
        )
    if X.ndim < 2:
        raise ValueError(
            f"{name}: got shape {tuple(X.shape)}; give matrices, [..., rows, columns]: reshape or unsqueeze"
        )
    if square and X.shape[-1] != X.shape[-2]:
        raise ValueError(f"{name}: got shape {tuple(X.shape)}; give square matrices, [..., n, n]")


def check_bound(c: object, X: Tensor) -> None:
    """Refuses a threshold that is not positive; the values of a tensor are not looked at."""
    if isinstance(c, Tensor):
        batch = X.shape[:-2]
        if c.is_complex() or c.dtype is torch.bool:
            raise TypeError(f"c: got dtype {c.dtype}; give a real number or a tensor of real numbers")
        if c.ndim > len(batch) or any(
            have not in (1, want) for have, want in zip(reversed(c.shape), reversed(batch), strict=False)
        ):
            raise ValueError(
                f"c: got shape {tuple(c.shape)}; give one number, or one a matrix: {tuple(batch)}"
            )
        if c.device != X.device and c.ndim:
            raise ValueError(
                f"c: got a tensor on {c.device} for X on {X.device}; move it with c.to(X.device)"
            )
    elif isinstance(c, bool) or not isinstance(c, (int, float)):
        raise TypeError(f"c: got {c!r}; give a positive number or a tensor of them")
    elif not c > 0:
        raise ValueError(f"c: got {c}; give a positive number (math.inf clips nothing)")


def check_number(name: str, given: object, above: float, allowed: str) -> None:
    """Refuses what is no number above a limit."""
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{name}: got {given!r}; give {allowed}")
    if not above < given < float("inf"):
        raise ValueError(f"{name}: got {given}; give {allowed}")


def check_count(name: str, given: object) -> int:
    """Refuses what is no positive integer."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name}: got {given!r}; give an integer of at least 1")
    if given < 1:
        raise ValueError(f"{name}: got {given}; give an integer of at least 1")
    return given


def wide(X: Tensor) -> tuple[Tensor, bool]:
    """[batch, m, n] with m <= n, and whether that took a transposition."""
    tall = X.shape[-2] > X.shape[-1]
    flat = X.reshape(-1, *X.shape[-2:])
    return (flat.mT if tall else flat), tall


def restore(Y: Tensor, X: Tensor, tall: bool) -> Tensor:
    """Undoes ``wide`` and gives the result X's shape and dtype."""
    return (Y.mT if tall else Y).to(X.dtype).reshape(X.shape)


def per_matrix(c: float | Tensor, X: Tensor) -> Tensor:
    """A threshold as float64 [batch, 1, 1] for the matrices of X."""
    if isinstance(c, Tensor):
        values = c.to(X.device, torch.float64)
    else:
        # Filled on the device: a copy from the host would wait, and cannot be captured in a graph.
        values = torch.full((), c, dtype=torch.float64, device=X.device)
    return values.expand(X.shape[:-2]).reshape(-1, 1, 1)


def frobenius(X: Tensor) -> Tensor:
    """[batch, 1, 1] in float64, also where squares leave the range of X's dtype."""
    if X.device.type != "cpu":
        return _far(X)
    # Sums in float64 take ten times as long on a CPU: only for the matrices that need them.
    work = torch.promote_types(X.dtype, torch.float32)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=work).double()
    low, high = _SAFE[work]
    odd = [index for index, size in enumerate(norm.flatten().tolist()) if not low < size < high]
    if odd:
        norm[odd] = _far(X[odd])
    return norm


def _far(X: Tensor) -> Tensor:
    """The norm of numbers whose squares float32 cannot hold, nor float64 if they are float64."""
    if X.dtype is not torch.float64:
        return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    peak = torch.linalg.vector_norm(X, math.inf, dim=(-2, -1), keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    return peak * torch.linalg.vector_norm(X / peak, dim=(-2, -1), keepdim=True)


def reciprocal(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the norm, finite for zero."""
    return norm.reciprocal().clamp(max=torch.finfo(dtype).max).to(dtype)


def add_identity(A: Tensor, a: float | Tensor) -> Tensor:
    """``A + a I`` in place; a is a number or [batch, 1, 1]."""
    A.diagonal(dim1=-2, dim2=-1).add_(a.reshape(-1, 1) if isinstance(a, Tensor) else a)
    return A
