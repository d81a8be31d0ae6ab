"""Orthogonalisation by Newton–Schulz iterations, on X itself or on its Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .coefficients import Coefficients
from .products import gram, multiply_add, polynomial


def standard(X: Tensor, steps: Sequence[Coefficients]) -> Tensor:
    """``X := a X + (b A + c A²) X`` with ``A = X Xᵀ``."""
    for a, b, c in steps:
        A = gram(X)
        X = multiply_add(X, polynomial(A, b, c) if c else b * A, a)
    return X


def in_gram_form(X: Tensor, steps: Sequence[Coefficients], restarts: Sequence[int]) -> Tensor:
    """The same iterates ``Q X``: the wide matrix is touched at the start, at restarts and at the end."""
    starts = [0, *restarts, len(steps)]
    for begin, end in zip(starts, starts[1:], strict=False):
        X = torch.bmm(inverse_root(gram(X), steps[begin:end]), X)
    return X


def inverse_root(R: Tensor, steps: Sequence[Coefficients]) -> Tensor:
    """Q with ``Q R Q`` towards the identity."""
    Q = None
    for i, (a, b, c) in enumerate(steps):
        Z = polynomial(R, b, c) if c else b * R
        if Q is None:
            Q = Z.clone()
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            Q = multiply_add(Q, Z, a)
        if i + 1 < len(steps):
            RZ = multiply_add(R, Z, a)
            R = multiply_add(RZ, Z, a)
    assert Q is not None
    return Q
