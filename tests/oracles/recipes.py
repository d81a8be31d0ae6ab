"""Recipes for N:M sparsity retold in plain torch, from their papers, around an optimizer of torch's.

Each function is a training loop: ``gradient(w)`` is the loss's gradient at what the model sees, and this is
yielded before every step and after the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def nm(w: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m along the last dimension, by a stable sort."""
    groups = w.detach().abs().view(-1, m)
    order = groups.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(groups).scatter_(1, order[:, :n], 1.0).view(w.shape)


def asp(w: Tensor, gradient: Gradient, make: Make, steps: int, at: int) -> Iterator[Tensor]:
    """One mask for good; gradients and weights are multiplied with it around the optimizer's step."""
    optimizer, mask = make([w]), torch.ones_like(w)
    for t in range(steps):
        if t == at:
            mask = nm(w, 2, 4)
            w.data *= mask
        yield w.detach().clone()
        w.grad = gradient(w) * mask
        optimizer.step()
        w.data *= mask
    yield w.detach().clone()


def sr_ste(
    w: Tensor, gradient: Gradient, make: Make, steps: int, decay: float, dense: int = 0, every: int = 1
) -> Iterator[Tensor]:
    """A new mask in every forward pass, the gradient passed straight through, pruned weights regularised."""
    optimizer, mask = make([w]), torch.ones_like(w)
    for t in range(steps):
        if t == dense or (t > dense and t % every == 0):
            mask = nm(w, 2, 4)
        yield (w * mask).detach()
        w.grad = gradient(w * mask) + decay * (1 - mask) * w.detach()
        optimizer.step()
    yield (w * (nm(w, 2, 4) if steps % every == 0 else mask)).detach()


def mask_decay(
    w: Tensor, gradient: Gradient, make: Make, steps: int, dense: int, factor: Callable[[int], float]
) -> Iterator[Tensor]:
    """Pruned weights are multiplied with a factor that falls after a dense phase."""
    optimizer = make([w])
    for t in range(steps + 1):
        mask = nm(w, 2, 4)
        shown = w * (mask + (1 - mask) * (1.0 if t < dense else factor(t - dense)))
        yield shown.detach()
        w.grad = gradient(shown)
        optimizer.step()


def structure_decay(
    w: Tensor, gradient: Gradient, make: Make, steps: int, dense: int, patterns: list[tuple[int, int]]
) -> Iterator[Tensor]:
    """A sequence of patterns in frames of equal length after a dense phase."""
    optimizer, frame = make([w]), (steps - dense) / len(patterns)
    for t in range(steps + 1):
        shown = w
        if t >= dense:
            shown = w * nm(w, *patterns[min(int((t - dense) / frame), len(patterns) - 1)])
        yield shown.detach().clone()
        w.grad = gradient(shown)
        optimizer.step()


@cache
def doubly_two_of_four() -> Tensor:
    """All 4x4 patterns with two ones in every row and column, found by trying all numbers of 16 bits."""
    grids = [
        [[bits >> 4 * row + column & 1 for column in range(4)] for row in range(4)] for bits in range(1 << 16)
    ]
    good = [grid for grid in grids if all(sum(line) == 2 for line in (*grid, *zip(*grid, strict=True)))]
    return torch.tensor(good, dtype=torch.float64)


def transposable(w: Tensor) -> Tensor:
    """Two of four in rows and columns of every 4x4 block, by trying all."""
    mask = torch.zeros_like(w)
    for i in range(0, w.shape[0], 4):
        for j in range(0, w.shape[1], 4):
            block = w.detach()[i : i + 4, j : j + 4].abs().double()
            scores = (doubly_two_of_four() * block).sum((1, 2))
            mask[i : i + 4, j : j + 4] = doubly_two_of_four()[scores.argmax()]
    return mask


def masked_decay(
    w: Tensor, gradient: Gradient, make: Make, steps: int, decay: float, every: int, dense_from: int
) -> Iterator[Tensor]:
    """Transposable masks that change seldom, decay on gradients, dense last steps."""
    optimizer, mask = make([w]), torch.ones_like(w)
    for t in range(steps + 1):
        if t >= dense_from:
            mask = torch.ones_like(w)
        elif t % every == 0:
            mask = transposable(w)
        yield (w * mask).detach()
        w.grad = gradient(w * mask) + decay * (1 - mask) * w.detach()
        optimizer.step()


def cast(
    w: Tensor, gradient: Gradient, steps: int, lr: float, l1: float, every: int, corrected: bool
) -> Iterator[Tensor]:
    """AdamS (specs/06): the momentum of pruned weights is mixed with the sign of the weight."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    mu, v, mask = torch.zeros_like(w), torch.zeros_like(w), torch.ones_like(w)
    for t in range(1, steps + 1):
        if (t - 1) % every == 0:
            mask = nm(w, 2, 4)
        yield w.detach().clone()
        alpha = (t - 1) / steps
        mu = beta1 * mu + (1 - beta1) * gradient(w)
        mixed = torch.where(mask == 1, mu, (1 - alpha) * mu + alpha * l1 * w.detach().sign())
        corrected_mixed = mixed / (1 - beta1**t)
        v = beta2 * v + (1 - beta2) * (corrected_mixed if corrected else mixed) ** 2
        w.data -= lr * corrected_mixed / ((v / (1 - beta2**t)).sqrt() + eps)
    w.data *= nm(w, 2, 4)
    yield w.detach().clone()


def exponential(coefficient: float, end: int) -> Callable[[int], float]:
    """A factor that falls exponentially and is cut off."""
    return lambda s: math.exp(-coefficient * s) if s < end else 0.0
