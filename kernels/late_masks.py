"""Masks that kernels cannot find while they update: other group sizes, other dimensions, 4x4 blocks.

A launch then applies the masks it has and leaves pruned weights whole where new ones are due; those are
found here, weight by weight, in plain torch or by kernels of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bucket import Bucket, Member, operands_of
from .control import Control
from .finders import Finder
from .launch import Key, Operands
from .masking import keeps_dense
from .planes import read, write
from .spec import Codec, Hyper

Late = tuple[Any, Any]
"""What factor of pruned weights remains, and how many of a group are kept (0: the masks stay)."""


def split_row(values: Sequence[Any]) -> tuple[tuple[Any, ...], Late]:
    """A row for a launch whose masks are found later, and what is done then."""
    *own, scale, kept = values
    found = kept > 0
    whole = torch.where(found, 1.0, scale) if isinstance(found, Tensor) else 1.0 if found else scale
    return (*own, whole, 0.0), (scale, kept)


class MaskedWeights:
    """One parameter's weights, mask, and what the model sees of them."""

    def __init__(self, key: Key, operands: Operands) -> None:
        slots = zip(key.rule.slots, key.states, operands.states, strict=True)
        homes = {slot.name: (codec, planes) for slot, codec, planes in slots}
        self._like, self._shown = operands.param[0], (key.param, operands.param)
        self._mask = homes["mask"]
        self._weights = homes["dense"] if keeps_dense(key.rule) else self._shown

    def _read(self, home: tuple[Codec, Sequence[Tensor]], out: Tensor | None = None) -> Tensor:
        codec, planes = home
        if out is None:
            out = torch.empty_like(self._like, dtype=torch.float32, memory_format=torch.preserve_format)
        return read(codec, planes, self._like, out)

    def values(self, out: Tensor | None = None) -> Tensor:
        """The weights in fp32."""
        return self._read(self._weights, out)

    def mask(self) -> Tensor:
        """Which weights are kept, as bools."""
        return self._read(self._mask) != 0

    def find(self, finder: Finder, kept: Any, active: Any = None) -> tuple[Tensor, Tensor]:
        """Finds the mask anew; returns the weights and which are kept."""
        p = self.values()
        keep = finder.find(p, kept)
        if isinstance(kept, Tensor):
            keep = torch.where(kept > 0, keep, self.mask())
        write(*self._mask, keep.float(), self._like, active)
        return p, keep

    def renew(self, finder: Finder, late: Late, active: Any = None) -> None:
        """Finds the mask and shows what it leaves; ``late`` may be on the device."""
        scale, kept = late
        self._show(*self.find(finder, kept, active), scale, active)

    def show(self, scale: Any) -> None:
        """What the mask leaves of the weights is the parameter."""
        self._show(self.values(), self.mask(), scale, None)

    def _show(self, p: Tensor, keep: Tensor, scale: Any, active: Any) -> None:
        if isinstance(scale, Tensor):
            shrunk = torch.where(scale != 0, scale * p, 0.0)
        else:
            shrunk = scale * p if scale else 0.0
        write(*self._shown, torch.where(keep, p, shrunk), self._like, active)


class LateMasks:
    """The masks of a bucket's members, found after a launch."""

    def __init__(self, weights: Sequence[MaskedWeights], finder: Finder) -> None:
        self._weights, self._finder = weights, finder
        self._rows: list[Late] = []

    def forget(self) -> None:
        """Before the rows of a step."""
        self._rows = []

    def row(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The row of the launch; the rest of it waits until then."""
        row, late = split_row(values)
        self._rows.append(late)
        return row

    def renew(self, bucket: Bucket, active: Any) -> None:
        """Finds those that are due."""
        for weights, late in zip(self._weights, bucket.per_member(self._rows), strict=True):
            if isinstance(late[1], Tensor) or late[1]:
                weights.renew(self._finder, late, active)


class MaskedBucket(Bucket):
    """Parameters whose masks are found after the launch that updates them."""

    def __init__(self, key: Key, members: list[Member], strided: bool, steps_on_device: bool) -> None:
        super().__init__(key, members, strided, steps_on_device)
        assert key.finder is not None
        weights = [MaskedWeights(key, operands) for operands in operands_of(members)]
        self._late = LateMasks(weights, key.finder)

    def rows_of(self, hyper: Hyper, step: Any, g_scale: Any) -> list[tuple[Any, ...]]:
        """The row of the launch."""
        (values,) = super().rows_of(hyper, step, g_scale)
        return [self._late.row(values)]

    def prepare(self, groups: Sequence[Hyper], control: Control) -> None:
        """Computes the scalars of the coming step."""
        self._late.forget()
        super().prepare(groups, control)

    def run(self) -> None:
        """Updates, then masks."""
        super().run()
        self._late.renew(self, self._control.active)
