"""From parameters to buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bucket import Bucket, Member


def build(members: Sequence[Member], steps_on_device: bool) -> list[Bucket]:
    """Sorts parameters into buckets; within one they keep the order of their groups.

    ``steps_on_device`` keeps the host from knowing step counts; on a CPU there is nothing to keep.
    """
    sorted_members: dict[Any, list[Member]] = {}
    for member in members:
        launched = member.numel > 0
        key = (member.key, launched, launched and not member.layout.flat)
        sorted_members.setdefault(key, []).append(member)
    return [
        Bucket(key, part, strided, steps_on_device and key.device.type != "cpu")
        for (key, _, strided), part in sorted_members.items()
    ]
