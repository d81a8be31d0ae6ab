"""What loss scaling, clipping and skipping make of a step: a gradient factor and whether to step at all.

Computed in float64: on the host for CPU tensors, by tensor operations on a GPU, which the host never reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Control(NamedTuple):
    """``g_scales`` holds one factor per group; ``active`` is None where nothing can skip the step."""

    g_scales: list[Any]
    active: Any


def _here(value: Tensor | int | None, device: torch.device) -> Any:
    """A float on the host, a 0-dim float64 tensor on any other device."""
    if value is None:
        return None
    # A scaler that saw no gradient passes the integer 0.
    if device.type == "cpu" or not isinstance(value, Tensor):
        return float(value)
    return value.to(device, torch.float64, non_blocking=True).reshape(())


def _at_most_one(factor: Any) -> Any:
    """``min(factor, 1)`` that keeps NaN, like torch's clipping."""
    return factor.clamp(max=1.0) if isinstance(factor, Tensor) else 1.0 if factor >= 1.0 else factor


def control(
    device: torch.device,
    grad_scale: Tensor | None,
    found_inf: Tensor | int | None,
    square_sum: Tensor | None,
    clips: Sequence[float | None],
    skip_nonfinite: bool,
) -> Control:
    """Combines a loss scaler's tensors, the gradients' sum of squares and each group's largest norm.

    The sum is -inf where float64 is too small for that of finite gradients.
    """
    if grad_scale is None and found_inf is None and square_sum is None:
        return Control([1.0] * len(clips), None)
    scale, inf, total = (_here(value, device) for value in (grad_scale, found_inf, square_sum))
    inverse = 1.0 if scale is None else 1.0 / scale
    g_scales = [inverse] * len(clips)
    if total is not None:
        norm = abs(total) ** 0.5
        norm = norm if scale is None else norm * inverse
        for group, clip in enumerate(clips):
            if clip is not None:
                # The constant is torch.nn.utils.clip_grad_norm_'s.
                g_scales[group] = inverse * _at_most_one(clip / (norm + 1e-6))
    active = None if inf is None else inf == 0
    if skip_nonfinite:
        assert total is not None
        finite = total < float("inf")
        active = finite if active is None else active & finite
    return Control(g_scales, active)
