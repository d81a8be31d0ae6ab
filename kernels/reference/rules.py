"""The rules in plain torch: ``p, g`` and states of one dtype, one rounding per operation.

This is what every other backend must equal bit for bit. ``k`` holds the row's scalars as 0-dim
tensors. Fused forms (``lerp``, ``addcdiv``) are avoided because they round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

States = tuple[Tensor, ...]
ReferenceRule = Callable[[Tensor, Tensor, States, Sequence[Tensor]], tuple[Tensor, States]]


def sqrt(x: Tensor) -> Tensor:
    """IEEE square root: torch's own float32 one is an ulp off for some inputs on some CPUs."""
    return x.double().sqrt().to(x.dtype)


def _adam_moments(p: Tensor, g: Tensor, m: Tensor, v: Tensor, k: Sequence[Tensor]) -> States:
    l2, w1, b2, w2 = k[:4]
    g = g + l2 * p
    m = m + w1 * (g - m)
    v = b2 * v + (w2 * g) * g
    return m, v


def _adam_finish(p: Tensor, m: Tensor, v: Tensor, k: Sequence[Tensor]) -> Tensor:
    c2, eps, step_size, decay = k[4:]
    u = m / (sqrt(v) * c2 + eps)
    return p - (step_size * u + decay * p)


def adam(p: Tensor, g: Tensor, s: States, k: Sequence[Tensor]) -> tuple[Tensor, States]:
    """Adam and AdamW: coupled (``l2``) or decoupled (``decay``) weight decay, the other being zero."""
    m, v = _adam_moments(p, g, s[0], s[1], k)
    return _adam_finish(p, m, v, k), (m, v)


def adam_amsgrad(p: Tensor, g: Tensor, s: States, k: Sequence[Tensor]) -> tuple[Tensor, States]:
    """Adam whose denominator is the largest second moment seen so far."""
    m, v = _adam_moments(p, g, s[0], s[1], k)
    vmax = torch.maximum(s[2], v)
    return _adam_finish(p, m, vmax, k), (m, v, vmax)


def lion(p: Tensor, g: Tensor, s: States, k: Sequence[Tensor]) -> tuple[Tensor, States]:
    """Lion: the sign of one average moves the weight, another is remembered."""
    b1, w1, b2, w2, lr, decay = k
    (m,) = s
    c = b1 * m + w1 * g
    u = (c > 0).to(c.dtype) - (c < 0).to(c.dtype)
    m = b2 * m + w2 * g
    return p - (lr * u + decay * p), (m,)


def sgd(p: Tensor, g: Tensor, s: States, k: Sequence[Tensor]) -> tuple[Tensor, States]:
    """Gradient descent with coupled L2 (``l2``) or decoupled decay, the other being zero."""
    l2, lr, decay = k
    g = g + l2 * p
    return p - (lr * g + decay * p), s


def sgd_momentum(p: Tensor, g: Tensor, s: States, k: Sequence[Tensor]) -> tuple[Tensor, States]:
    """Heavy ball and Nesterov momentum."""
    l2, mu, w, ng, nb, lr = k
    g = g + l2 * p
    b = mu * s[0] + w * g
    u = ng * g + nb * b
    return p - lr * u, (b,)


def cast_adam(p: Tensor, g: Tensor, s: States, k: Sequence[Tensor]) -> tuple[Tensor, States]:
    """CAST's AdamS: the momentum of pruned weights turns into an L1 decay; ``s[2]`` is the mask."""
    w1, b2, w2, c1, c2, eps, step_size, kept_part, l1 = k
    m, v, keep = s
    m = m + w1 * (g - m)
    sign = (p > 0).to(p.dtype) - (p < 0).to(p.dtype)
    mixed = torch.where(keep != 0, m, kept_part * m + l1 * sign)
    x = c1 * mixed
    v = b2 * v + (w2 * x) * x
    return p - step_size * (mixed / (sqrt(v) * c2 + eps)), (m, v)


RULES: dict[str, ReferenceRule] = {
    f.__name__: f for f in (adam, adam_amsgrad, lion, sgd, sgd_momentum, cast_adam)
}
