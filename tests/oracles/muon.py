"""Muon and its relatives: Jordan's blog of 2024, arXiv 2502.16982, 2510.05491 (NorMuon), 2603.28743 (MuonH).

The iterations are given from outside: the exact polar factor, or the polynomial that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.oracles.matrices import Array, on_sphere


def muon(
    theta: Array,
    grads: Sequence[Array],
    *,
    orthogonal: Callable[[Array], Array],
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    adjust_lr_fn: str | None = None,
    maximize: bool = False,
    beta2: float | None = None,
    radius: str | None = None,
) -> dict[str, Array]:
    """Parameter, momentum buffer and what else is kept, after all gradients of one matrix."""
    rows, columns = theta.shape
    scales = {
        "match_rms_adamw": 0.2 * np.sqrt(max(rows, columns)),
        "spectral_unclamped": np.sqrt(rows / columns),
    }
    scale = scales.get(adjust_lr_fn or "", np.sqrt(max(1, rows / columns)))
    buffer, second, first_norm = np.zeros_like(theta), np.zeros((rows, 1)), np.linalg.norm(theta)
    for given in grads:
        gradient = -given if maximize else given
        buffer = momentum * buffer + (1 - momentum) * gradient
        u = orthogonal((1 - momentum) * gradient + momentum * buffer if nesterov else buffer)
        if beta2 is not None:
            norm = np.linalg.norm(u)
            second = beta2 * second + (1 - beta2) * np.mean(u**2, axis=1, keepdims=True)
            u = u / (np.sqrt(second) + 1e-10)
            u = u * norm / (np.linalg.norm(u) + 1e-10)
        if radius is not None:
            theta = on_sphere(theta, u, lr, weight_decay, first_norm if radius == "fixed" else None)
        else:
            theta = theta * (1 - lr * weight_decay) - lr * scale * u
    more = {} if beta2 is None else {"row_second_moment": second}
    more |= {"radius": np.array([[first_norm]])} if radius == "fixed" else {}
    return {"param": theta, "momentum_buffer": buffer, **more}
