"""Checks of the options that Newton–Schulz iterations have in optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .cuts import check_shared
from .hypersphere import check_radius
from .kernels.rules import MUON, RULES
from .kernels.spec import Rule
from .kernels.spectral.coefficients import schedule

SCALES: Mapping[str, Callable[[int, int], float]] = {
    "original": lambda m, n: max(1.0, m / n) ** 0.5,
    "match_rms_adamw": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "spectral_unclamped": lambda m, n: (m / n) ** 0.5,
}
"""What ``adjust_lr_fn`` may be: factors for a matrix of m rows and n columns."""


ALGORITHMS: Mapping[str, Rule] = {"muon": MUON, "adamw": RULES["adam"], "lion": RULES["lion"]}
"""The rules that groups of one optimizer may follow."""


def triples(coefficients: Any) -> Sequence[Sequence[float]]:
    """Coefficients of each step, also if one triple was given for all."""
    if not isinstance(coefficients, Sequence):
        raise TypeError(
            f"ns_coefficients must be a name, (a, b, c) or a list of such triples, got {coefficients!r}"
        )
    alone = len(coefficients) > 0 and isinstance(coefficients[0], int | float)
    return [coefficients] if alone else coefficients


def check_newton_schulz(group: Mapping[str, Any]) -> None:
    """Checks the options of a group of Muon.

    Raises:
        ValueError: an unknown name or a number out of range.
        TypeError: a value of the wrong type.
    """
    steps, coefficients, scale = group["ns_steps"], group["ns_coefficients"], group["adjust_lr_fn"]
    if scale is not None and scale not in SCALES:
        raise ValueError(
            f"Adjust learning rate function {scale} is not supported; allowed: None, {', '.join(SCALES)}"
        )
    if isinstance(steps, int) and steps >= 100:
        raise ValueError(f"Number of steps must be less than 100 for computational efficiency, got {steps}")
    schedule(coefficients if isinstance(coefficients, str) else triples(coefficients), steps)
    if group["ns_dtype"] not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"ns_dtype={group['ns_dtype']!r} is not possible; allowed: None, torch.float32, torch.bfloat16, "
            "torch.float16"
        )
    beta2 = group["beta2"]
    if beta2 is not None and (isinstance(beta2, bool) or not isinstance(beta2, int | float | torch.Tensor)):
        raise TypeError(f"beta2 must be a number in [0, 1), or None, got {beta2!r}")
    if beta2 is not None and not 0.0 <= beta2 < 1.0:
        raise ValueError(f"Invalid beta2: {beta2}; it must be in [0, 1), or None")
    if group["radius"] is not None:
        check_radius(group["radius"])
    if group["algorithm"] not in ALGORITHMS:
        raise ValueError(f"algorithm={group['algorithm']!r} is unknown; allowed: {', '.join(ALGORITHMS)}")
    check_shared(group["split"], group["workspace_bytes"])
