"""Whether a step is right, checked on sampled elements before it is timed.

All rules here work element by element, so a few thousand elements of the real tensors, followed
through the same steps in float64, tell whether the step that will be timed computes what it should.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .peers import PEERS, recipes

_PER_TENSOR = 64


class Sampler:
    """The first, the last and random elements of every tensor, as one float64 vector on the CPU."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._indices = []
        for shape in shapes:
            numel = torch.Size(shape).numel()
            chosen = torch.randint(numel, (_PER_TENSOR,), generator=generator)
            chosen[:2] = torch.tensor([0, numel - 1])
            self._indices.append(chosen.unique().to(device))

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        parts = [t.detach().flatten()[index] for t, index in zip(tensors, self._indices, strict=True)]
        return torch.cat(parts).to("cpu", torch.float64)


def _reference(rule: str, param: Parameter, hyper: dict[str, Any]) -> Optimizer:
    """torch.optim's plain loop in float64, or our reference driver for a rule that torch lacks."""
    name = PEERS["torch-foreach"].classes.get(rule)
    if name is not None:
        return getattr(torch.optim, name)([param], **hyper, foreach=False)
    recipe = recipes()[rule]
    return recipe.cls([param], **hyper, backend="reference")


def change_in_float64(rule: str, hyper: dict[str, Any], start: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """How much the sampled elements change when they step with ``grads``, one after the other."""
    param = Parameter(start.clone())
    optimizer = _reference(rule, param, hyper)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach() - start


def relative_error(change: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected change; NaN counts as wrong."""
    return float((change - expected).norm() / expected.norm())
