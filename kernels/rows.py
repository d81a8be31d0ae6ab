"""Scalar rows: everything in a step that depends on the step count, prepared once per step.

On the host in Python floats (IEEE float64), rounded once to the row's dtype; or, where the host must
not know the step count (CUDA graphs, a loss scaler, skipped steps), on the device in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .spec import Hyper, Rule

_TENSOR_OPTIONS = ("lr", "betas", "weight_decay", "eps", "momentum", "dampening")


def _resolve(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        # A tensor on the CPU is read at once and becomes a constant of a captured graph, as in torch.optim.
        if device is None or value.device.type == "cpu":
            return float(value.detach())
        return value.detach().to(device, torch.float64).reshape(())
    if isinstance(value, tuple | list):
        return tuple(_resolve(item, device) for item in value)
    return value


def _holds_tensor(value: Any) -> bool:
    # Floats first: most are, and to ask whether something is a tensor takes several times as long.
    if isinstance(value, float):
        return False
    return any(map(_holds_tensor, value)) if isinstance(value, tuple | list) else isinstance(value, Tensor)


def resolve(group: Hyper, device: torch.device | None = None) -> Hyper:
    """A group whose tensor options are floats (``device=None``) or float64 tensors on ``device``."""
    changed = [key for key in _TENSOR_OPTIONS if _holds_tensor(group.get(key))]
    return {**group, **{key: _resolve(group[key], device) for key in changed}} if changed else group


def row(rule: Rule, hyper: Hyper, step: Any, g_scale: Any) -> tuple[Any, ...]:
    """``g_scale`` and the rule's scalars for parameters of a group that take their ``step``-th step."""
    sign = -1.0 if hyper["maximize"] else 1.0
    return sign * g_scale, *rule.row(hyper, step)


def host_row(values: tuple[float, ...]) -> tuple[float, ...]:
    """A whole row of floats."""
    g_scale, *scalars = values
    # Numpy would make NaN of None.
    return 1.0, float(g_scale), 0.0, 0.0, *map(float, scalars)


def write(rows: Tensor, values: tuple[Any, ...], active: Any) -> None:
    """Fills rows on the device, one per parameter, rounding once."""
    g_scale, *scalars = values
    header = 1.0 if active is None else active, g_scale, 0.0, 0.0
    for column, value in zip(rows.unbind(1), (*header, *scalars), strict=True):
        if isinstance(value, Tensor):
            column.copy_(value)
        else:
            column.fill_(value)
