"""Whole matrices out of shards: every rank gets some of them, so that together they work on each one once."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


class Exchange:
    """Moves equal DTensors between two places: a part of each on every rank, or some of them whole.

    Ranks that hold the same parts (replicated dimensions of a mesh) get the same matrices. All ranks must
    call the same methods in the same order.
    """

    def __init__(self, like: Any, count: int) -> None:
        from torch.distributed.tensor import Replicate, Shard

        self._mesh, self._count, self._shape = like.device_mesh, count, tuple(like.shape)
        self._parts = [Shard(each.dim + 1) if each.is_shard() else each for each in like.placements]
        self._some = [Shard(0) if each.is_shard() else each for each in like.placements]
        self._all = [Replicate()] * len(like.placements)

    def whole(self, parts: Tensor) -> Tensor:
        """``[tensors, *shape of a shard]`` -> ``[this rank's tensors, *shape]``."""
        return self._move(parts, self._shape, self._parts, self._some)

    def parts(self, whole: Tensor) -> Tensor:
        """Back again."""
        return self._move(whole, self._shape, self._some, self._parts)

    def own(self, values: Tensor) -> Tensor:
        """The entries of this rank's tensors, of values that every rank has."""
        return self._move(values, values.shape[1:], self._all, self._some)

    def all(self, own: Tensor) -> Tensor:
        """The entries of all tensors."""
        return self._move(own, own.shape[1:], self._some, self._all)

    def _move(self, local: Tensor, shape: Any, source: Any, target: Any) -> Tensor:
        from torch.distributed.tensor import DTensor

        shape = (self._count, *shape)
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        spread: Any = DTensor.from_local(
            local.contiguous(), self._mesh, source, run_check=False, shape=shape, stride=tuple(strides)
        )
        return spread.redistribute(placements=target).to_local()
