"""Arithmetic on what may be a number on the host or a tensor on a device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def cos(x: Any) -> Any:
    """The cosine."""
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)


def limit(x: Any, low: float, high: float) -> Any:
    """The nearest value from ``low`` to ``high``."""
    return x.clamp(low, high) if isinstance(x, Tensor) else min(max(x, low), high)
