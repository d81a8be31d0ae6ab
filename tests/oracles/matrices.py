"""What optimizers do with whole matrices, by the singular value decomposition in float64."""

from __future__ import annotations

import numpy as np

from tests.oracles import spectral

Array = np.ndarray


def unchanged(x: Array) -> Array:
    """Nothing happens to it."""
    return x


def soft_clip(x: Array, c: float) -> Array:
    """SPECTRA's H_c (arXiv 2603.14315); vectors are matrices of one row."""
    return spectral.soft_clip(np.atleast_2d(x), c).reshape(x.shape)


def spectra(x: Array, c: float) -> Array:
    """The update that SPECTRA applies: clipped, and scaled where a matrix is tall."""
    rows, columns = (1, 1) if x.ndim == 1 else x.shape[-2:]
    return soft_clip(x, c) * np.sqrt(max(1, rows / columns))


def on_sphere(theta: Array, u: Array, lr: float, weight_decay: float, radius: float | None = None) -> Array:
    """One step of hypersphere optimization (arXiv 2603.28743); ``radius``: what to keep, else the norm."""
    theta = theta * (1 - lr * weight_decay)
    radius = np.linalg.norm(theta) if radius is None else radius
    radius = np.sqrt(theta.shape[0]) if radius == 0 else radius
    moved = theta - lr * radius * u / max(np.linalg.norm(u), 1e-8)
    return moved * radius / np.linalg.norm(moved)
