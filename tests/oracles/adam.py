"""Adam as its papers write it: arXiv 1412.6980, 1904.09237 (amsgrad), 1711.05101 (decoupled decay).

Differences that torch.optim made standard: eps stands outside of the bias correction, amsgrad keeps
the maximum of the uncorrected second moment, and the decoupled decay is multiplied by lr.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.oracles.matrices import Array, unchanged


def adam(
    theta: Array,
    grads: Sequence[Array | None],
    *,
    lr: float | Sequence[float] = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    clip: Callable[[Array], Array] = unchanged,
    update: Callable[[Array], Array] = unchanged,
    decoupled_weight_decay: bool = False,
) -> dict[str, Array]:
    """Parameter and moments after all gradients; a step whose gradient is None does not count."""
    real = theta.dtype.type
    beta1, beta2 = real(betas[0]), real(betas[1])
    first, second, largest = (np.zeros_like(theta) for _ in range(3))
    t = 0
    for i, given in enumerate(grads):
        if given is None:
            continue
        t += 1
        alpha = real(lr if isinstance(lr, float) else lr[i])
        gradient = clip(-given if maximize else given)
        if decoupled_weight_decay:
            theta = theta * (1 - alpha * real(weight_decay))
        else:
            gradient = gradient + real(weight_decay) * theta
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        largest = np.maximum(largest, second)
        first_hat = first / (1 - beta1**t)
        second_hat = (largest if amsgrad else second) / (1 - beta2**t)
        theta = theta - alpha * update(first_hat / (np.sqrt(second_hat) + real(eps)))
    moments = {"exp_avg": first, "exp_avg_sq": second}
    return {"param": theta, **moments, **({"max_exp_avg_sq": largest} if amsgrad else {})}
