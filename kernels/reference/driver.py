"""The reference driver: one tensor at a time, decode, rule, encode. Runs on every torch device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .codecs import CODECS
from .rules import RULES

if TYPE_CHECKING:
    from ..plan import Bucket


def unavailable() -> None:
    """Always usable."""
    return None


def step(bucket: Bucket) -> None:
    """Updates every tensor of the bucket whose row is active."""
    rule, param_codec = RULES[bucket.rule.name], CODECS[bucket.param.name]
    state_codecs = [CODECS[codec.name] for codec in bucket.states]
    for index, row_index in enumerate(bucket.row_indices):
        active, g_scale, *k = bucket.rows[row_index].unbind()
        active = active != 0
        p = param_codec.decode(bucket.param_planes[index])
        g = bucket.grads[index].to(p.dtype)
        s = tuple(
            c.decode(planes) for c, planes in zip(state_codecs, bucket.state_planes[index], strict=True)
        )
        new_p, new_s = rule(p, g * g_scale, s, k)
        param_codec.encode(torch.where(active, new_p, p), bucket.param_planes[index])
        for codec, planes, old, new in zip(state_codecs, bucket.state_planes[index], s, new_s, strict=True):
            codec.encode(torch.where(active, new, old), planes)


def square_sum(bucket: Bucket) -> Tensor:
    """Sum of the squares of all gradients in float64: finite exactly when every gradient is."""
    total = torch.zeros((), dtype=torch.float64, device=bucket.device)
    for grad in bucket.grads:
        total += grad.double().square().sum()
    return total
