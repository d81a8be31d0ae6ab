"""From parameters to buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .bucket import Bucket, Member
from .late_masks import MaskedBucket
from .matrix import MatrixBucket, chunks


def build(members: Sequence[Member], steps_on_device: bool) -> list[Bucket]:
    """Sorts parameters into buckets; within one they keep the order of their groups.

    ``steps_on_device`` keeps the host from knowing step counts; on a CPU there is nothing to keep.
    """
    sorted_members: dict[Any, list[Member]] = {}
    for member in members:
        # Of matrices a rank may hold nothing and yet work on some of them.
        cut = member.param.numel() > 0 and member.key.cut is not None
        launched = member.numel > 0 and not cut
        key = (member.key, launched, launched and not member.layout.flat, cut)
        sorted_members.setdefault(key, []).append(member)
    whole = {key: part for key, part in sorted_members.items() if not key[3]}
    buckets = [
        (MaskedBucket if key.finder is not None and launched else Bucket)(
            key, part, strided, steps_on_device and key.device.type != "cpu"
        )
        for (key, launched, strided, _), part in whole.items()
    ]
    cut = [part for key, some in sorted_members.items() if key[3] for part in chunks(some)]
    # Ranks exchange matrices in the order of the parameters, whatever their own parts of these are like.
    cut.sort(key=lambda part: part[0].ordinal)
    return [*buckets, *_cut_buckets(cut, steps_on_device)]


def _cut_buckets(parts: Sequence[list[Member]], steps_on_device: bool) -> list[Bucket]:
    """One workspace on every device, for the largest part."""
    needed: dict[torch.device, int] = {}
    for part in parts:
        device = part[0].key.device
        needed[device] = max(needed.get(device, 0), sum(member.numel for member in part))
    memory = {
        device: torch.zeros(numel, dtype=torch.float32, device=device) for device, numel in needed.items()
    }
    return [
        MatrixBucket(key, part, steps_on_device and key.device.type != "cpu", memory[key.device])
        for part in parts
        for key in [part[0].key]
    ]
