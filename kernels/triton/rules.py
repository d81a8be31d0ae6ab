"""The rules as functions of values in registers: ``rule(p, g, s, k, EXACT) -> p, s``.

``k`` holds the row's scalars in the catalogue's order. A rule is found by its name in the catalogue.
"""

import triton
import triton.language as tl

from .arithmetic import decayed, div, maximum, normal, sign, sqrt


@triton.jit
def _adam_moments(p, g, m, v, k):
    g = g + k[0] * p
    m = m + k[1] * (g - m)
    v = k[2] * v + (k[3] * g) * g
    return m, v


@triton.jit
def _adam_finish(p, m, v, k, EXACT: tl.constexpr):
    c2, eps, step_size, decay = k[4:]
    u = div(m, sqrt(v, EXACT) * c2 + normal(eps, EXACT), EXACT)
    return decayed(p, decay, step_size * u, EXACT)


@triton.jit
def adam(p, g, s, k, EXACT: tl.constexpr):
    m, v = _adam_moments(p, g, s[0], s[1], k)
    return _adam_finish(p, m, v, k, EXACT), (m, v)


@triton.jit
def adam_amsgrad(p, g, s, k, EXACT: tl.constexpr):
    m, v = _adam_moments(p, g, s[0], s[1], k)
    vmax = maximum(s[2], v)
    return _adam_finish(p, m, vmax, k, EXACT), (m, v, vmax)


@triton.jit
def lion(p, g, s, k, EXACT: tl.constexpr):
    b1, w1, b2, w2, lr, decay = k
    m = s[0]
    u = sign(b1 * m + w1 * g)
    m = b2 * m + w2 * g
    return decayed(p, decay, lr * u, EXACT), (m,)


@triton.jit
def sgd(p, g, s, k, EXACT: tl.constexpr):
    l2, lr, decay = k
    g = g + l2 * p
    return decayed(p, decay, lr * g, EXACT), s


@triton.jit
def sgd_momentum(p, g, s, k, EXACT: tl.constexpr):
    l2, mu, w, ng, nb, lr = k
    g = g + l2 * p
    b = mu * s[0] + w * g
    u = ng * g + nb * b
    return p - lr * u, (b,)


@triton.jit
def cast_adam(p, g, s, k, EXACT: tl.constexpr):
    w1, b2, w2, c1, c2, eps, step_size, kept_part, l1 = k
    m, v, keep = s
    m = m + w1 * (g - m)
    mixed = tl.where(keep, m, kept_part * m + l1 * sign(p))
    x = c1 * mixed
    v = b2 * v + (w2 * x) * x
    return p - step_size * div(mixed, sqrt(v, EXACT) * c2 + normal(eps, EXACT), EXACT), (m, v)
