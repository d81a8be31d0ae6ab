"""The sum of the squares of all gradients, of which a rank may hold parts only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.bucket import Bucket
from .shards import sum_of_ranks


def square_sum(buckets: Sequence[Bucket]) -> Tensor | None:
    """The sum over all ranks, in float64 on the first sum's device; None if there is nothing to sum.

    Shards are summed over those dimensions of their mesh that hold other parts: one number is sent for each
    mesh. A rank sends 0 if its shards are empty, and all ranks send in the order of the parameters, so that
    every rank finds the same bits.
    """
    sums = [bucket.driver.square_sum(bucket) for bucket in buckets if bucket.launched and not bucket.spread]
    in_order = sorted(buckets, key=lambda bucket: min(member.ordinal for member in bucket.members))
    for spread in dict.fromkeys(bucket.spread for bucket in in_order):
        if spread is not None:
            own = _of_this_rank([bucket for bucket in buckets if bucket.spread == spread])
            sums.append(sum_of_ranks(own, *spread))
    if not sums:
        return None
    return sum((s.to(sums[0].device, non_blocking=True) for s in sums[1:]), start=sums[0])


def _of_this_rank(buckets: Sequence[Bucket]) -> Tensor:
    own = torch.zeros((), dtype=torch.float64, device=buckets[0].device)
    for bucket in buckets:
        if bucket.launched:
            own += bucket.driver.square_sum(bucket)
    return own
