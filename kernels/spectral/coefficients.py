"""Schedules of odd polynomials ``a x + b x³ + c x⁵`` that drive singular values towards one."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .matrices import check_count

Coefficients = tuple[float, float, float]

_JORDAN = ((3.4445, -4.7750, 2.0315),)
_CUBIC = ((1.5, -0.5, 0.0),)
_YOU = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01
_SLACK = 2.0**-10


class Schedule(NamedTuple):
    """Polynomials in order, and the factor by which the first input stays below one."""

    steps: tuple[Coefficients, ...]
    margin: float = 1.0


def _safe(steps: Sequence[Coefficients]) -> tuple[Coefficients, ...]:
    """Room for singular values that rounding pushed above one, in all but the last polynomial."""
    shrunk = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in steps[:-1]]
    return (*shrunk, steps[-1])


NAMED = {
    "polar_express": Schedule(_safe(_POLAR_EXPRESS), _SAFETY),
    "jordan": Schedule(_JORDAN),
    "you": Schedule(_YOU),
    "cubic": Schedule(_CUBIC),
}


def _custom(given: Iterable[Iterable[float]]) -> Schedule:
    allowed = "one of " + ", ".join(map(repr, NAMED)) + ", or a sequence of (a, b, c)"
    try:
        steps = [tuple(float(x) for x in step) for step in given]
    except TypeError:
        raise TypeError(f"coefficients: got {given!r}; give {allowed}") from None
    if not steps or any(len(step) != 3 for step in steps):
        raise ValueError(
            f"coefficients: got {given!r}; every step needs exactly three numbers: give {allowed}"
        )
    if not all(math.isfinite(x) for step in steps for x in step):
        raise ValueError(f"coefficients: got {given!r}; give finite numbers")
    return Schedule(tuple((a, b, c) for a, b, c in steps))


def schedule(given: str | Iterable[Iterable[float]], steps: object) -> Schedule:
    """The polynomials of ``steps`` steps; the last one given is repeated as often as needed."""
    count = check_count("steps", steps)
    if isinstance(given, str) and given not in NAMED:
        raise ValueError(f"coefficients: got {given!r}; give one of {', '.join(map(repr, NAMED))}")
    found = NAMED[given] if isinstance(given, str) else _custom(given)
    if not isinstance(given, str) and len(found.steps) > count:
        raise ValueError(
            f"coefficients: got {len(found.steps)} triples for {count} steps; give at most one for each step"
        )
    repeated = (*found.steps, *[found.steps[-1]] * count)
    return found._replace(steps=repeated[:count])


def _quintic(lower: float, upper: float) -> Coefficients:
    """The odd quintic nearest to one on an interval, by Remez' exchange."""
    if upper - lower < 1e-4 * upper:
        # Beyond this the extremes cannot be told apart: the quintic that is flattest at one.
        middle = (lower + upper) / 2
        return 1.875 / middle, -1.25 / middle**3, 0.375 / middle**5
    q, r, error = (3 * lower + upper) / 4, (lower + 3 * upper) / 4, math.inf
    a = b = c = 0.0
    for _ in range(100):
        points = np.array([lower, q, r, upper])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, found = np.linalg.solve(system, np.ones(4))
        if abs(error - found) <= 1e-15:
            break
        error = found
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return float(a), float(b), float(c)


@functools.lru_cache(maxsize=256)
def optimal(lower: float, steps: int) -> tuple[tuple[Coefficients, ...], float]:
    """The best composition for singular values in [lower, 1], and how far below one it leaves them.

    Composing the best quintic for each interval in turn is optimal among all compositions (Amsel et al.,
    Polar Express, arXiv 2505.16932, theorem 4.1).

    >>> steps, error = optimal(1e-3, 8)
    >>> error < 1e-5
    True
    """
    found: list[Coefficients] = []
    low, high = lower, 1 + _SLACK
    for _ in range(steps):
        a, b, c = _quintic(low, high)
        found.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        # The upper end is unstable: rounding would leave the interval a little further every time.
        high = (2 - low) * (1 + _SLACK)
    return tuple(found), 1 - low
