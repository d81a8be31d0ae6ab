"""SGD with momentum as torch.optim.SGD documents it: the first buffer is the first gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.oracles.matrices import Array, unchanged


def sgd(
    theta: Array,
    grads: Sequence[Array | None],
    *,
    lr: float | Sequence[float] = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    clip: Callable[[Array], Array] = unchanged,
    update: Callable[[Array], Array] = unchanged,
) -> dict[str, Array]:
    """Parameter and momentum buffer after all gradients."""
    real = theta.dtype.type
    mu, tau = real(momentum), real(dampening)
    buffer: Array | None = None
    for i, given in enumerate(grads):
        if given is None:
            continue
        gamma = real(lr if isinstance(lr, float) else lr[i])
        gradient = clip(-given if maximize else given) + real(weight_decay) * theta
        if momentum == 0:
            theta = theta - gamma * update(gradient)
            continue
        buffer = gradient if buffer is None else mu * buffer + (1 - tau) * gradient
        theta = theta - gamma * update(gradient + mu * buffer if nesterov else buffer)
    state = (
        {} if momentum == 0 else {"momentum_buffer": buffer if buffer is not None else np.zeros_like(theta)}
    )
    return {"param": theta, **state}
