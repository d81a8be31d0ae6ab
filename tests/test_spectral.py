"""The spectral functions against float64 SVDs, over shapes, spectra, scales and dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_optim
from fused_optim.kernels.spectral import stacked
from fused_optim.kernels.spectral.coefficients import NAMED, optimal, schedule
from fused_optim.spectral import (
    SpectralClip,
    hard_clip,
    inverse_sqrt,
    orthogonalize,
    soft_clip,
    spectral_norm,
)
from tests.oracles import spectral as oracle

SHAPES = [(24, 96), (96, 24), (64, 64), (1, 17), (17, 1), (33, 70)]
SPECTRA = ["flat", "decades", "power", "spike", "rank one"]
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "orthogonalize": orthogonalize,
    "gram form": lambda X: orthogonalize(X, form="gram", dtype=torch.float32),
    "soft_clip": lambda X: soft_clip(X, 1.0),
    "soft_clip float64": lambda X: soft_clip(X.double(), 1.0).to(X.dtype),
    "hard_clip": lambda X: hard_clip(X, 1.0),
}


# Small matrices: threads only wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")


def _matrix(m: int, n: int, kind: str, largest: float, seed: int = 0) -> Tensor:
    return torch.from_numpy(oracle.with_spectrum(np.random.default_rng(seed), m, n, kind, largest))


def _error(found: Tensor, expected: np.ndarray) -> float:
    """Relative, in the Frobenius norm."""
    return float(np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_clip_is_the_svds(shape: tuple[int, int], kind: str) -> None:
    for ratio, single, half in (
        (0.1, 1e-4, 2e-2),
        (3, 1e-4, 2e-2),
        (58, 1e-4, 2e-2),
        (300, 1e-4, 2e-2),
        (1e4, 1e-2, 4e-2),
    ):
        X = _matrix(*shape, kind, ratio)
        for dtype, bound in (
            (torch.float32, single),
            (torch.bfloat16, half),
            (torch.float16, 2e-3),
            (torch.float64, 1e-8),
        ):
            given = X.to(dtype)
            assert _error(soft_clip(given, 1.0), oracle.soft_clip(given.double().numpy(), 1.0)) < bound, (
                ratio,
                dtype,
            )


def test_soft_clip_of_larger_matrices_is_the_svds() -> None:
    """Where rational steps, sums of inverses and polynomials take the place of eigenvalues."""
    for m, n, kind, ratio, dtype, bound in (
        (200, 260, "decades", 28, torch.bfloat16, 2e-2),
        (260, 200, "decades", 300, torch.bfloat16, 2e-2),
        (200, 200, "spike", 300, torch.bfloat16, 2e-2),
        (200, 200, "decades", 1000, torch.float64, 1e-8),
        (384, 400, "decades", 25, torch.float32, 1e-4),
        (400, 384, "power", 300, torch.float32, 1e-4),
        (130, 300, "decades", 3, torch.float32, 1e-4),
        (130, 300, "decades", 300, torch.float32, 1e-4),
        (130, 130, "spike", 1e4, torch.float32, 1e-2),
        (384, 400, "decades", 1e4, torch.float32, 1e-2),
    ):
        X = _matrix(m, n, kind, ratio).to(dtype)
        expected = oracle.soft_clip(X.double().numpy(), 1.0)
        assert _error(soft_clip(X, 1.0), expected) < bound, (kind, ratio, dtype)


def test_soft_clip_of_a_batch_with_all_ratios() -> None:
    """Matrices with different plans, among them one that is not clipped, one of zeros, one that is bad."""
    for m, n in ((20, 30), (70, 60)):
        X = torch.stack(
            [_matrix(m, n, "decades", ratio) for ratio in (1e-4, 1.0, 3.0, 40.0, 300.0, 1.0, 1.0)]
        )
        X[5], X[6, 3, 4] = 0, math.nan
        c = torch.tensor([1.0, 1.0, 0.5, 1.0, 2.0, 1.0, 1.0])
        H = soft_clip(X.float(), c)
        for i in range(5):
            assert _error(H[i], oracle.soft_clip(X[i].numpy(), c[i].item())) < 1e-4, (m, i)
        assert not H[5].any() and H[6].isnan().all()


def test_soft_clip_reaches_any_tolerance() -> None:
    X = _matrix(40, 60, "decades", 20)
    expected = oracle.soft_clip(X.numpy(), 1.0)
    errors = [_error(soft_clip(X, 1.0, tolerance=10.0**-k), expected) for k in (1, 3, 6, 9, 12)]
    assert all(error < 10.0**-k for error, k in zip(errors, (1, 3, 6, 9, 12), strict=True))


@pytest.mark.parametrize("kind", SPECTRA)
def test_soft_clip_by_products_alone(kind: str) -> None:
    """What runs on a GPU, on a CPU."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for ratio, bound in ((3, 1e-4), (300, 1e-4), (1e4, 1e-2)):
        X = _matrix(64, 160, kind, ratio).float()
        expected = oracle.soft_clip(X.double().numpy(), 1.0)
        assert _error(stacked.soft_clip(X[None], one, one, 3e-5, 1e4)[0], expected) < bound
    X = _matrix(64, 64, kind, 10).float()
    expected = oracle.hard_clip(X.double().numpy(), 1.0)
    assert np.abs(stacked.hard_clip(X[None], one, one)[0].double().numpy() - expected).max() < 1e-3
    A = X @ X.mT / 100 + 1e-2 * torch.eye(64)
    assert _error(stacked.inverse_root(A[None], 1e-2)[0], oracle.inverse_sqrt(A.numpy(), 0.0)) < 1e-3


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hard_clip_is_the_svds(shape: tuple[int, int], kind: str) -> None:
    for ratio in (0.5, 10, 1e3):
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 4e-3), (torch.float64, 1e-9)):
            X = _matrix(*shape, kind, ratio).to(dtype)
            assert _error(hard_clip(X, 1.0), oracle.hard_clip(X.double().numpy(), 1.0)) < bound, (
                ratio,
                dtype,
            )


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("name", NAMED)
def test_orthogonalize_is_the_polynomials(name: str, form: str) -> None:
    for steps in (1, 5, 8):
        plan = schedule(name, steps)
        for m, n in ((24, 96), (96, 24), (40, 40)):
            X = _matrix(m, n, "power", 7.0)
            expected = oracle.newton_schulz(X.numpy(), plan.steps, plan.margin)
            for dtype, bound in (
                (torch.float64, 1e-8),
                (torch.float32, 1e-4),
                (torch.float16, 3e-2),
                (torch.bfloat16, 8e-2),
            ):
                found = orthogonalize(X, name, steps, form=form, dtype=dtype)  # pyright: ignore[reportArgumentType]
                assert _error(found, expected) < bound, (steps, m, n, dtype)


@pytest.mark.parametrize(
    ("name", "smallest", "low", "high"),
    [
        ("jordan", 1e-2, 0.68, 1.20),
        ("jordan", 1e-3, 0.47, 1.20),
        ("you", 1e-3, 0.47, 1.15),
        ("polar_express", 1e-3, 0.84, 1.12),
    ],
)
def test_range_of_five_steps(name: str, smallest: float, low: float, high: float) -> None:
    """The bounds of the schedules as published, for singular values down to ``smallest``."""
    plan = schedule(name, 5)
    x = np.geomspace(smallest, 1, 20001) / plan.margin
    for a, b, c in plan.steps:
        x = a * x + b * x**3 + c * x**5
    assert low - 0.006 < x.min() and x.max() < high + 0.006


def test_accurate_schedule_is_orthogonal() -> None:
    for m, n in ((128, 128), (64, 256), (256, 64)):
        X = torch.randn(m, n) + 2 * torch.eye(m, n)
        for form in ("standard", "gram"):
            sigma = torch.linalg.svdvals(orthogonalize(X, "polar_express", 8, form=form, dtype=torch.float32))
            assert sigma.min() / sigma.median() > 0.97 and sigma.max() / sigma.median() < 1.03
        error = _error(orthogonalize(X, "polar_express", 9, dtype=torch.float32), oracle.polar(X.numpy()))
        assert error < 1e-4


def test_best_quintics() -> None:
    """Each composition leaves the interval within its error of one, and eight steps reach 1e-5 from 1e-4."""
    assert optimal(1e-4, 8)[1] < 1e-4
    for lower, steps in ((0.5, 2), (1e-2, 4), (1e-3, 6), (1e-5, 9)):
        polynomials, error = optimal(lower, steps)
        x = np.geomspace(lower, 1, 10001)
        for a, b, c in polynomials:
            x = a * x + b * x**3 + c * x**5
        assert np.abs(x - 1).max() < 1.05 * error + 1e-6


def test_inverse_sqrt_is_the_eigenvalues() -> None:
    for kind in SPECTRA:
        half = _matrix(30, 30, kind, 5.0)
        A = half @ half.mT
        for dtype in (torch.float64, torch.float32):
            for scale in (1e-20, 1.0, 1e20):
                given = (A * scale).to(dtype)
                expected = oracle.inverse_sqrt(given.double().numpy(), 1e-4)
                assert _error(inverse_sqrt(given, ridge=1e-4), expected) < 1e-5
    Q = inverse_sqrt(torch.stack([A.float(), torch.zeros(30, 30), torch.full((30, 30), math.nan)]))
    assert Q[0].isfinite().all() and not Q[1].any() and Q[2].isnan().all()


def test_spectral_norm_from_both_sides() -> None:
    for m, n in SHAPES:
        for kind in SPECTRA:
            for scale in (1e-30, 1.0, 1e30):
                X = (_matrix(m, n, kind, 2.0) * scale).float()
                exact = oracle.spectral_norm(X.numpy())
                assert 0.98 < spectral_norm(X, steps=32).item() / exact < 1 + 1e-5
                assert 1 - 1e-6 < spectral_norm(X, upper=True).item() / exact < 1.01 * min(m, n) ** (1 / 16)
    X = torch.stack([torch.zeros(4, 5), torch.full((4, 5), math.inf), torch.ones(4, 5)])
    for upper in (False, True):
        zero, bad, good = spectral_norm(X, upper=upper)
        assert zero == 0 and bad.isnan() and good.item() == pytest.approx(math.sqrt(20), rel=1e-5)
    assert spectral_norm(torch.randn(2, 3, 4, 5)).shape == (2, 3)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_dtypes_and_limits(name: str) -> None:
    function = FUNCTIONS[name]
    for shape in ((5, 7), (7, 5), (1, 9), (9, 1), (1, 1), (2, 3, 8, 4), (3, 6, 6)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            X = torch.randn(shape).to(dtype)
            before = X.clone()
            Y = function(X)
            assert Y.shape == X.shape and Y.dtype == X.dtype and Y.isfinite().all()
            assert torch.equal(X, before)
            assert not function(torch.zeros_like(X)).any()
    assert function(torch.randn(0, 4, 5)).shape == (0, 4, 5)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_matrix_stays_alone(name: str, bad: float) -> None:
    function = FUNCTIONS[name]
    for shape in ((4, 12, 20), (4, 20, 12)):
        X = torch.randn(shape)
        X[2, 3, 4] = bad
        X[3] *= 100
        Y = function(X)
        assert Y[2].isnan().all()
        for i in (0, 1, 3):
            assert torch.allclose(Y[i], function(X[i]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_invariance(scale: float) -> None:
    for shape in ((20, 50), (50, 20), (30, 30)):
        X = torch.randn(shape)
        for form in ("standard", "gram"):
            expected = orthogonalize(X, form=form, dtype=torch.float32)
            assert torch.dist(orthogonalize(X * scale, form=form, dtype=torch.float32), expected) < 1e-3
        for clip in (soft_clip, hard_clip):
            found = clip(X * scale, 2 * scale) / scale
            assert torch.dist(found, clip(X, 2.0)) < 1e-3
            assert torch.allclose(clip(X * 1e-30, 1e8) * 1e30, X)
        assert torch.dist(soft_clip(X * 1e30, 1.0), torch.from_numpy(oracle.polar(X.numpy()))) < 1e-2


@pytest.mark.parametrize("shape", [(8, 8), (25, 25), (40, 30), (64, 64), (256, 256)], ids=str)
@pytest.mark.parametrize("exponent", [*range(-45, -36), -30, -20, *range(-15, -10), -7, 0, 7, 12, 20, 30, 37])
def test_every_scale_of_float32(exponent: int, shape: tuple[int, int]) -> None:
    """Down to the smallest numbers; beside the tolerance there is what float32 itself rounds off."""
    X = (torch.randn(shape, dtype=torch.float64) * 10.0**exponent).float()
    unit = 10.0**exponent
    exact, atol = X.double().numpy() / unit, 2.0**-149 * X.numel() ** 0.5 / unit
    for c in (1.0, 3 * unit):
        for name, clip in (("soft_clip", soft_clip), ("hard_clip", hard_clip)):
            expected = getattr(oracle, name)(exact, c / unit)
            error = np.linalg.norm(clip(X, c).double().numpy() / unit - expected)
            # Far above c, 2^-20 of the norm is the least that soft_clip keeps in view.
            tolerance = 2e-2 if c < 1e-4 * unit else 3e-4
            assert error <= tolerance * np.linalg.norm(expected) + atol, (name, c)
    largest = oracle.spectral_norm(exact)
    estimate, bound = (spectral_norm(X, steps=32, upper=upper).item() / unit for upper in (False, True))
    assert 0.97 * largest - atol <= estimate <= (1 + 1e-5) * largest + atol
    assert bound >= (1 - 1e-5) * largest - atol


def test_every_scale_of_other_dtypes() -> None:
    for exponent in (-300, -160, -42, 160, 300):
        X = torch.randn(40, 30, dtype=torch.float64)
        far = X * 10.0**exponent
        for clip in (soft_clip, hard_clip):
            assert _error(clip(far, 3 * 10.0**exponent) / 10.0**exponent, clip(X, 3.0).numpy()) < 1e-8
        assert spectral_norm(far, steps=30).item() / 10.0**exponent == pytest.approx(
            oracle.spectral_norm(X.numpy())
        )
    for exponent in (-40, -35, -12, 34, 37):
        X = (torch.randn(40, 30) * 10.0**exponent).bfloat16()
        expected = oracle.soft_clip(X.double().numpy() * 10.0**-exponent, 10.0**-exponent)
        for clip in (soft_clip, hard_clip):
            assert _error(clip(X, 1.0).double() * 10.0**-exponent, expected) < 2e-2, (exponent, clip)


def test_updates_of_zero_gradients_vanish_and_stay_finite() -> None:
    weight = torch.nn.Parameter(torch.randn(32, 32))
    optimizer = fused_optim.AdamW([weight], lr=1e-3, spectral=SpectralClip())
    for step in range(401):
        weight.grad = torch.zeros_like(weight) if step else torch.randn_like(weight)
        optimizer.step()
    assert weight.isfinite().all()


def test_matrices_without_elements() -> None:
    for shape in ((0, 4), (4, 0), (3, 0, 4), (0, 4, 5)):
        X = torch.zeros(shape)
        for function in FUNCTIONS.values():
            assert function(X).shape == shape
        for upper in (False, True):
            assert torch.equal(spectral_norm(X, upper=upper), torch.zeros(shape[:-2]))
    assert inverse_sqrt(torch.zeros(0, 0)).shape == (0, 0)


def test_more_triples_than_steps_are_refused() -> None:
    triples = [(1.5, -0.5, 0.0)] * 7
    with pytest.raises(ValueError, match="got 7 triples for 5 steps"):
        orthogonalize(torch.ones(4, 4), triples, 5)
    assert torch.equal(orthogonalize(torch.eye(4), triples[:2], 7), orthogonalize(torch.eye(4), triples, 7))
