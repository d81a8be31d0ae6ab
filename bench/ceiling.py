"""The machine's own matmul speed beside that of Newton–Schulz iterations.

A contender's operations are those of the products that it computes, two for each multiplication: five steps
of ``X Xᵀ``, ``A²`` and ``B X`` are ``5 (4 m² n + 2 m³)`` for an m × n matrix, m <= n. Where one triangle of a
symmetric product is computed or the Gram form is taken, they are fewer. What is no product counts as time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fused_optim.kernels.spectral import newton_schulz

from .comparison import Contender

STEPS = 5


def _wide(X: Tensor) -> tuple[int, int, int]:
    """Matrices, smaller and larger size."""
    return X[..., 0, 0].numel(), min(X.shape[-2:]), max(X.shape[-2:])


def full(batches: Iterable[Tensor]) -> int:
    """Operations of the iteration with whole products."""
    return sum(b * STEPS * (4 * m * m * n + 2 * m**3) for b, m, n in map(_wide, batches))


def triangles(batches: Iterable[Tensor]) -> int:
    """Operations of the iteration with one triangle of each symmetric product."""
    return sum(b * STEPS * m * ((m + 1) * (n + m) + 2 * m * n) for b, m, n in map(_wide, batches))


def ours(batches: Iterable[Tensor], coefficients: tuple[float, float, float], form: str) -> int:
    """Operations of ``orthogonalize`` in bfloat16."""
    steps, total = [coefficients] * STEPS, 0
    for X in batches:
        b, m, n = _wide(X)
        task = m, n, steps, torch.bfloat16, X.device.type
        total += b * newton_schulz.flops(*task, newton_schulz.auto_form(*task) if form == "auto" else form)
    return total


class Products:
    """One step's three products of a batch in bfloat16, by torch into memory of their own."""

    def __init__(self, X: Tensor) -> None:
        self._X = (X if X.shape[-2] <= X.shape[-1] else X.mT).to(torch.bfloat16).contiguous()
        self._A = torch.bmm(self._X, self._X.mT) / self._X.shape[-1]
        self._outs = torch.empty_like(self._A), torch.empty_like(self._X)
        self.flops = full([X]) // STEPS

    def batched(self) -> None:
        """All matrices in one call."""
        (square, like), X, A = self._outs, self._X, self._A
        torch.bmm(X, X.mT, out=square)
        torch.bmm(A, A, out=square)
        torch.bmm(A, X, out=like)

    def one_by_one(self) -> None:
        """A call for every matrix."""
        for square, like, X, A in zip(*self._outs, self._X, self._A, strict=True):
            torch.mm(X, X.T, out=square)
            torch.mm(A, A, out=square)
            torch.mm(A, X, out=like)


def matmuls(products: Sequence[Products]) -> list[Contender]:
    """Both ways to compute the products; the faster one is the ceiling."""

    def batched() -> None:
        for one in products:
            one.batched()

    def one_by_one() -> None:
        for one in products:
            one.one_by_one()

    flops = sum(one.flops for one in products)
    calls = {"torch.bmm": batched, "torch.mm": one_by_one}
    return [Contender(f"{name}, one step", call, flops=flops) for name, call in calls.items()]
