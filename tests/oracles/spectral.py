"""Functions of singular values by their definition: a float64 SVD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

Array = np.ndarray


def on_singular_values(X: Array, function: Callable[[Array], Array]) -> Array:
    """``U f(Σ) Vᵀ`` of matrices ``[..., m, n]``."""
    values = X.astype(np.float64)
    U, sigma, Vt = _svd(values.shape, values.tobytes())
    return (U * function(sigma)[..., None, :]) @ Vt


# Several functions of one matrix are asked for in a row.
@lru_cache(maxsize=4)
def _svd(shape: tuple[int, ...], values: bytes) -> tuple[Array, Array, Array]:
    return np.linalg.svd(np.frombuffer(values).reshape(shape), full_matrices=False)


def soft_clip(X: Array, c: float) -> Array:
    return on_singular_values(X, lambda sigma: sigma / np.hypot(1, sigma / c))


def hard_clip(X: Array, c: float) -> Array:
    return on_singular_values(X, lambda sigma: np.minimum(sigma, c))


def polar(X: Array) -> Array:
    """The nearest orthogonal matrix; zero singular values stay zero."""
    return on_singular_values(X, lambda sigma: (sigma > 1e-12 * sigma.max(initial=0)).astype(float))


def newton_schulz(X: Array, steps: Sequence[Sequence[float]], margin: float = 1.0) -> Array:
    """What the polynomials make of the singular values, which are divided by their norm first."""

    def iterate(sigma: Array) -> Array:
        norm = np.sqrt(np.sum(sigma**2))
        x = sigma / (margin * norm) if norm else sigma
        for a, b, c in steps:
            x = a * x + b * x**3 + c * x**5
        return x

    return on_singular_values(X, iterate)


def inverse_sqrt(A: Array, ridge: float) -> Array:
    values, vectors = np.linalg.eigh((A + A.T).astype(np.float64) / 2)
    norm = np.sqrt(np.sum(values**2))
    return (vectors / np.sqrt(np.maximum(values, 0) + ridge * norm)) @ vectors.T


def spectral_norm(X: Array) -> float:
    values = X.astype(np.float64)
    return float(_svd(values.shape, values.tobytes())[1].max())


def with_spectrum(rng: np.random.Generator, m: int, n: int, kind: str, largest: float) -> Array:
    """A matrix in float64 with random singular vectors and a spectrum of a certain kind."""
    k = min(m, n)
    U, _ = np.linalg.qr(rng.standard_normal((m, k)))
    V, _ = np.linalg.qr(rng.standard_normal((n, k)))
    x = np.linspace(0, 1, k)
    sigma = {
        "flat": np.ones(k),
        "decades": 10 ** (-4 * x),
        "power": 1 / (1 + np.arange(k)),
        "spike": np.where(np.arange(k) == 0, 1, 1 / largest),
        "rank one": np.where(np.arange(k) == 0, 1.0, 0.0),
    }[kind]
    return (U * (sigma * largest)) @ V.T
