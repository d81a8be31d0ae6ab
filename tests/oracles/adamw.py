"""AdamW: arXiv 1711.05101, algorithm 2, with its schedule multiplier and lr made one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.oracles.adam import Array, adam


def adamw(
    theta: Array, grads: Sequence[Array | None], *, weight_decay: float = 1e-2, **options: Any
) -> dict[str, Array]:
    """Parameter and moments after all gradients."""
    return adam(theta, grads, weight_decay=weight_decay, decoupled_weight_decay=True, **options)
