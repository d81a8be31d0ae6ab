"""Masks and masked rules in plain torch: what every other backend must equal bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..masking import block_ways
from ..spec import Rule
from .rules import RULES, ReferenceRule, States

_QUIET_NAN = 0x7FC00000


def magnitudes(x: Tensor) -> Tensor:
    """Integers in the order of fp32 magnitudes; a NaN is larger than every number, and they are all equal."""
    return torch.where(x.isnan(), _QUIET_NAN, x.view(torch.int32) & 0x7FFFFFFF)


def largest_of_groups(x: Tensor, group: int, kept: Tensor | int) -> Tensor:
    """Which of a flat tensor's values are among the ``kept`` largest magnitudes of their ``group``.

    Of equal magnitudes the first count as larger; a last group may have fewer members.
    """
    keys = torch.nn.functional.pad(magnitudes(x), (0, -len(x) % group), value=-1).view(-1, group)
    index = torch.arange(group, device=x.device)
    mine, others = keys.unsqueeze(2), keys.unsqueeze(1)
    beaten = (others > mine) | ((others == mine) & (index < index.unsqueeze(1)))
    return (beaten.sum(2) < kept).flatten()[: len(x)]


@cache
def block_patterns() -> Tensor:
    """``[90, 8]``: the places that each of the 90 ways keeps of a block."""
    places = [[place for place in range(16) if way >> place & 1] for way in block_ways()]
    return torch.tensor(places, device="cpu")


def best_of_blocks(w: Tensor) -> Tensor:
    """Masks of ``[..., 4 m, 4 n]`` weights that keep two of four in every row and column of a 4x4 block.

    The sum of magnitudes is the largest of the 90 ways: added in the order of places, in fp32, a NaN
    counting as zero. Of equal ones the first wins.
    """
    shape = (*w.shape[:-2], w.shape[-2] // 4, 4, w.shape[-1] // 4, 4)
    blocks = w.reshape(shape).transpose(-3, -2)
    magnitude = blocks.abs().nan_to_num(nan=0.0, posinf=float("inf")).reshape(-1, 16)
    places = block_patterns().to(w.device)
    # As many blocks at a time as fit a cache beside their 90 sums.
    best = [_best(part, places) for part in magnitude.split(8192)]
    keep = torch.zeros_like(magnitude, dtype=torch.bool)
    if best:
        keep.scatter_(1, torch.cat(best), True)
    return keep.view(blocks.shape).transpose(-3, -2).reshape(w.shape)


def _best(magnitude: Tensor, places: Tensor) -> Tensor:
    total = magnitude[:, places[:, 0]]
    for i in range(1, 8):
        total = total + magnitude[:, places[:, i]]
    return places[total.argmax(1)]


def rule_of(rule: Rule) -> ReferenceRule:
    """A rule's function, masked or not."""
    if rule.inner is None:
        return RULES[rule.name]
    inner, group = rule.inner, rule.group

    def masked(p: Tensor, g: Tensor, s: States, k: Sequence[Tensor]) -> tuple[Tensor, States]:
        pruned_grad, pruned_decay, pruned_scale, kept = k[len(inner.scalars) :]
        states, (mask, *dense) = s[: len(inner.slots)], s[len(inner.slots) :]
        p = dense[0] if dense else p
        keep = mask != 0
        g = torch.where(keep, g, torch.where(pruned_grad != 0, g, 0.0) + pruned_decay * p)
        # Only cast_adam looks at the mask.
        visible = (*states, mask) if inner.name == "cast_adam" else states
        p, states = RULES[inner.name](p, g, visible, k[: len(inner.scalars)])
        if group:
            keep = torch.where(kept > 0, largest_of_groups(p, group, kept), keep)
        shown = torch.where(keep, p, torch.where(pruned_scale != 0, pruned_scale * p, 0.0))
        return shown, (*states, keep.to(p.dtype), *((p,) if dense else ()))

    return masked
