"""Spectral norms."""

from __future__ import annotations

import torch
from torch import Tensor


def spectral_norm(X: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(X.double(), 2).to(X.dtype)
