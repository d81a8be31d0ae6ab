"""The reference driver: one tensor at a time, decode, rule, encode. Runs on every torch device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layout import flat
from .codecs import CODECS
from .masking import rule_of
from .philox import Stream

if TYPE_CHECKING:
    from ..launch import Launch


def unavailable() -> None:
    """Always usable."""
    return None


def lacks(_: object) -> bool:
    """It has every codec and rule: it is their definition."""
    return False


def _write(planes: Sequence[Tensor], values: Sequence[Tensor], order_of: Tensor, active: Tensor) -> None:
    for plane, value in zip(planes, values, strict=True):
        memory = flat(plane, order_of)
        memory.copy_(torch.where(active, value.view(memory.shape), memory))


def step(bucket: Launch) -> None:
    """Updates every tensor of the bucket whose row is active."""
    rule, codecs = rule_of(bucket.rule), [CODECS[c.name] for c in (bucket.param, *bucket.states)]
    for index, row_index in enumerate(bucket.row_indices):
        seed, step_number = bucket.random_key(row_index)
        active, g_scale, _, _, *k = bucket.rows[row_index].unbind()
        active = active != 0
        param = bucket.params[index]
        homes = [bucket.param_planes[index], *bucket.state_planes[index]]
        p, *s = (
            codec.decode([flat(plane, param).flatten() for plane in planes])[: param.numel()]
            for codec, planes in zip(codecs, homes, strict=True)
        )
        g = flat(bucket.grads[index], param).flatten().to(p.dtype)
        p, s = rule(p, g * g_scale, tuple(s), k)
        for slot, (codec, planes, x) in enumerate(zip(codecs, homes, (p, *s), strict=True)):
            stream = Stream(seed, step_number, bucket.ordinals[index], slot)
            _write(planes, codec.encode(x, stream), param, active)


def square_sum(bucket: Launch) -> Tensor:
    """Sum of the squares of all gradients in float64: finite exactly when every gradient is."""
    total = torch.zeros((), dtype=torch.float64, device=bucket.device)
    for grad in bucket.grads:
        total += grad.double().square().sum()
    return total
