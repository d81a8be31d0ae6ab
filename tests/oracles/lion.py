"""Lion: arXiv 2302.06675, algorithm 2, in the order of operations of google/automl."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.oracles.matrices import Array, unchanged


def lion(
    theta: Array,
    grads: Sequence[Array | None],
    *,
    lr: float | Sequence[float] = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    clip: Callable[[Array], Array] = unchanged,
    update: Callable[[Array], Array] = unchanged,
) -> dict[str, Array]:
    """Parameter and momentum after all gradients; the sign of NaN is 0, as torch.sign has it on a CPU."""
    real = theta.dtype.type
    beta1, beta2 = real(betas[0]), real(betas[1])
    momentum = np.zeros_like(theta)
    for i, given in enumerate(grads):
        if given is None:
            continue
        eta = real(lr if isinstance(lr, float) else lr[i])
        gradient = clip(-given if maximize else given)
        theta = theta * (1 - eta * real(weight_decay))
        direction = np.sign(beta1 * momentum + (1 - beta1) * gradient)
        theta = theta - eta * update(np.nan_to_num(direction))
        momentum = beta2 * momentum + (1 - beta2) * gradient
    return {"param": theta, "exp_avg": momentum}
