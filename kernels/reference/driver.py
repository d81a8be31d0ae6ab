"""The reference driver: one tensor at a time, decode, rule, encode. Runs on every torch device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layout import flat, memory_order
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


def step(bucket: Launch) -> None:
    """Updates every tensor of the bucket whose row is active."""
    rule, codecs = rule_of(bucket.rule), [CODECS[c.name] for c in (bucket.param, *bucket.states)]
    rows = [row.unbind() for row in bucket.rows]
    # Only here does the host know.
    asleep = [bucket.device.type == "cpu" and row[0] == 0 for row in rows]
    for index, row_index in enumerate(bucket.row_indices):
        if asleep[row_index]:
            continue
        seed, step_number = bucket.random_key(row_index)
        active, g_scale, _, _, *k = rows[row_index]
        param = bucket.params[index]
        order = memory_order(param)
        homes = [
            [flat(plane, param, order) for plane in planes]
            for planes in (bucket.param_planes[index], *bucket.state_planes[index])
        ]
        p, *s = (
            codec.decode([plane.reshape(-1) for plane in planes])[: param.numel()]
            for codec, planes in zip(codecs, homes, strict=True)
        )
        g = flat(bucket.grads[index], param, order).reshape(-1).to(p.dtype)
        p, s = rule(p, g * g_scale, tuple(s), k)
        for slot, (codec, planes, x) in enumerate(zip(codecs, homes, (p, *s), strict=True)):
            stream = Stream(seed, step_number, bucket.ordinals[index], slot, bucket.drawn[index])
            for plane, value in zip(planes, codec.encode(x, stream), strict=True):
                value = value.view(plane.shape)
                plane.copy_(value if param.device.type == "cpu" else torch.where(active != 0, value, plane))


def square_sum(bucket: Launch) -> Tensor:
    """Sum of the squares of all gradients in float64: below infinity exactly when every gradient is finite.

    It is -inf where gradients in float64 are finite and the sum is too large: such sums add up to -inf, and
    with the +inf of another launch's gradients to NaN.
    """
    total = torch.zeros((), dtype=torch.float64, device=bucket.device)
    for grad in bucket.grads:
        total += grad.double().square().sum()
    # Only on a CPU does the host know; the gradients are then not read again.
    if bucket.grad.compute != "float64" or (bucket.device.type == "cpu" and total.isfinite()):
        return total
    finite = torch.stack([grad.isfinite().all() for grad in bucket.grads]).all()
    return torch.where(finite & total.isinf(), -total, total)
