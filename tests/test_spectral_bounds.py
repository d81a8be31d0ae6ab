"""Soft clipping of matrices whose largest singular vector a power iteration's start does not see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim.kernels.spectral import stacked
from fused_optim.kernels.spectral.norm import largest_bounds, start
from fused_optim.spectral import (
    SpectralClip,
    hard_clip,
    inverse_sqrt,
    orthogonalize,
    soft_clip,
    spectral_norm,
)

LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SIZES = [25, 32, 48, 64, 100, 256, 384, 512]


# Small matrices: threads only wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")


def _hidden(m: int, gap: float, ratio: float) -> Tensor:
    """One singular value of ``ratio``, all others ``ratio / gap``, its vector orthogonal to the start."""
    generator = torch.Generator().manual_seed(m)
    unseen = start(m, torch.zeros((), dtype=torch.float64)).flatten()
    A, B = (torch.randn(m, m, generator=generator, dtype=torch.float64) for _ in range(2))
    A[:, 0] -= unseen * (unseen @ A[:, 0])
    U, V = torch.linalg.qr(A)[0], torch.linalg.qr(B)[0]
    S = torch.full((m,), ratio / gap, dtype=torch.float64)
    S[0] = ratio
    return (U * S) @ V.mT


def _clipped(X: Tensor, c: float | Tensor = 1.0) -> Tensor:
    U, S, V = torch.linalg.svd(X.double(), full_matrices=False)
    bound = c.double().unsqueeze(-1) if isinstance(c, Tensor) else c
    return (U * (S / (1 + (S / bound) ** 2).sqrt()).unsqueeze(-2)) @ V


def _errors(found: Tensor, expected: Tensor) -> Tensor:
    difference = torch.linalg.matrix_norm(found.double() - expected)
    return difference / torch.linalg.matrix_norm(expected)


def _stepped(X: Tensor) -> Tensor:
    """What one step of SGD with a clipped update adds."""
    weight = Parameter(torch.zeros_like(X))
    optimizer = fused_optim.SGD([weight], lr=1.0, spectral=SpectralClip(post=1.0))
    weight.grad = X.clone()
    optimizer.step()
    return -weight.detach()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("m", [pytest.param(m, marks=pytest.mark.slow) if m > 256 else m for m in SIZES])
def test_hidden_direction(m: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for gap, ratio in ((1.5, 1.5), (2.0, 3.0), (2.0, 30.0), (4.0, 300.0)):
        for dtype, limit in LIMIT.items():
            X = _hidden(m, gap, ratio).to(dtype)
            expected = _clipped(X)
            for found in (soft_clip(X, 1.0), _stepped(X)):
                assert _errors(found, expected) < limit, (gap, ratio, dtype)
                assert torch.linalg.matrix_norm(found.double(), 2) < 1 + limit, (gap, ratio, dtype)


def _with_noise(count: int, seed: int) -> Tensor:
    """Matrices of 64 x 64 of 1 to 11 directions and noise."""
    g = torch.Generator().manual_seed(seed)
    rank = torch.randint(1, 12, (count, 1, 1), generator=g)
    sizes = torch.logspace(0, -1, 11) * (torch.arange(11) < rank)
    low = torch.randn(count, 64, 11, generator=g) * sizes @ torch.randn(count, 11, 64, generator=g)
    return low + 1e-2 * torch.randn(count, 64, 64, generator=g)


@pytest.mark.parametrize("seed", [0, 5])
def test_low_rank_and_noise(seed: int) -> None:
    """Of these 2000 matrices 13 were clipped wrongly while a power iteration bounded their norms."""
    X = _with_noise(2000, seed)
    generator = torch.Generator().manual_seed(seed)
    c = torch.linalg.matrix_norm(X, 2) / 10 ** (2.4 * torch.rand(len(X), generator=generator))
    assert _errors(soft_clip(X, c), _clipped(X, c)).max() < 1e-4
    # A step's thresholds are one number: matrices are scaled to it.
    stack = X / c.reshape(-1, 1, 1)
    assert _errors(_stepped(stack), _clipped(stack)).max() < 1e-4


@pytest.mark.parametrize("m", SIZES)
def test_bounds_are_above_the_norm_and_near(m: int) -> None:
    gaussian = torch.randn(m, m + 7, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    halves = torch.diag((torch.arange(m) < m // 2).double())
    for X in (*(_hidden(m, gap, 1.0) for gap in (1.05, 3.0, 1e4)), gaussian, halves, halves * 0):
        G = (X @ X.mT).float().unsqueeze(0)
        largest = torch.linalg.matrix_norm(X, 2) ** 2
        (found,) = largest_bounds(G)
        assert largest <= found <= 2.6 * largest + 1e-30
    bad = torch.full((1, m, m), torch.nan)
    assert not math.isfinite(largest_bounds(bad)[0])


@pytest.mark.parametrize("m", [25, 64, 256])
def test_other_functions_see_hidden_directions(m: int) -> None:
    for gap in (1.5, 4.0):
        X = _hidden(m, gap, 30.0).float()
        U, S, V = torch.linalg.svd(X.double(), full_matrices=False)
        kept = (U * S.clamp(max=20.0)) @ V
        assert _errors(hard_clip(X, 20.0), kept) < 1e-4
        # As on other devices.
        d = torch.full((1, 1, 1), 20.0, dtype=torch.float64)
        assert _errors(stacked.hard_clip(X[None], d, d)[0], kept) < 1e-3
        for ratio in (30.0, 300.0):
            found = stacked.soft_clip(X[None], d / ratio, d / ratio, 3e-5, 1e3)[0]
            assert _errors(found, _clipped(X, 20.0 / ratio)) < 1e-4
        norm = torch.linalg.matrix_norm(X.double(), 2)
        assert norm <= spectral_norm(X, upper=True) <= 1.5 * norm
        assert spectral_norm(X, steps=m) <= norm * (1 + 1e-5)
        moved = torch.linalg.svdvals(orthogonalize(X, steps=8, dtype=torch.float32))
        assert (moved - 1).abs().max() < 1e-3
        A = X @ X.mT
        Q = inverse_sqrt(A, ridge=1e-3).double()
        ridged = (A.double() + A.double().mT) / 2
        ridged += 1e-3 * torch.linalg.matrix_norm(ridged) * torch.eye(m, dtype=torch.float64)
        assert torch.dist(Q @ ridged @ Q, torch.eye(m, dtype=torch.float64)) < 1e-3 * m**0.5


@pytest.mark.parametrize("m", [256, 384, 512])
def test_rank_one(m: int) -> None:
    """What is largest is what products cancel to."""
    generator = torch.Generator().manual_seed(m)
    for ratio in (3.0, 100.0, 300.0):
        x, y = (torch.randn(m, generator=generator, dtype=torch.float64) for _ in range(2))
        X = torch.outer(x, y / (x.norm() * y.norm()) * ratio).float()
        assert _errors(soft_clip(X, 1.0), _clipped(X)) < 8e-5


@pytest.mark.parametrize("rows", [8, 40, 100, 300])
def test_results_require_no_gradients(rows: int) -> None:
    X = torch.randn(rows, rows, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for function in (lambda: soft_clip(X, 1.0), lambda: hard_clip(X, 1.0), lambda: orthogonalize(X)):
        assert not function().requires_grad
    assert not inverse_sqrt(X).requires_grad
    assert not spectral_norm(X).requires_grad
    assert not spectral_norm(X, upper=True).requires_grad


def test_float64_far_above_the_norm() -> None:
    """What a threshold leaves alone comes back as exactly as asked for."""
    X = torch.randn(50, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for c, tolerance in ((math.inf, None), (1e9, None), (math.inf, 1e-12), (3e4, 1e-12)):
        error = torch.dist(soft_clip(X, c, tolerance=tolerance), _clipped(X, c)) / X.norm()
        assert error <= (1e-9 if tolerance is None else 1e-12)


@pytest.mark.parametrize(("m", "n", "rank"), [(64, 64, 1), (64, 200, 8), (300, 300, 5)])
def test_missing_directions_stay_missing(m: int, n: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    X = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    values = torch.linalg.svdvals(orthogonalize(X, steps=8, dtype=torch.float32).double())
    assert (values[:rank] - 1).abs().max() < 2e-3 and values[rank:].max() < 2e-2
