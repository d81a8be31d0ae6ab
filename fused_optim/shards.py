"""What a rank holds of a DTensor, and what all ranks hold together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.layout import walked
from .storage import is_dtensor, local_view


def spread(param: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """A DTensor's mesh and those of its dimensions that hold other parts of it; None if all hold all."""
    if not is_dtensor(param):
        return None
    placements: Any = param.placements  # pyright: ignore[reportAttributeAccessIssue]
    dims = tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())
    return (param.device_mesh, dims) if dims else None  # pyright: ignore[reportAttributeAccessIssue]


def widths(param: Tensor, dim: int) -> set[int]:
    """How large a dimension is: of a DTensor on each rank."""
    dim %= param.ndim
    sizes = {param.shape[dim]}
    placements: Any = param.placements if is_dtensor(param) else ()  # pyright: ignore[reportAttributeAccessIssue]
    for axis, placement in enumerate(placements):
        if not placement.is_replicate() and placement.dim == dim:
            ranks = param.device_mesh.size(axis)  # pyright: ignore[reportAttributeAccessIssue]
            parts = {size: -(-size // ranks) for size in sizes}
            sizes = {max(0, min(part, size - i * part)) for size, part in parts.items() for i in range(ranks)}
    return sizes


def sum_of_ranks(value: Tensor, mesh: Any, dims: Sequence[int]) -> Tensor:
    """What the ranks along these dimensions of a mesh have, summed in place."""
    for dim in dims:
        torch.distributed.all_reduce(value, group=mesh.get_group(dim))
    return value


def drawn_before(param: Tensor) -> int:
    """How many counters of random bits, one for eight elements, belong to shards before this rank's.

    Shards of whole rows, whose lengths are multiples of eight, draw the same bits as the whole parameter
    would, on any number of ranks. Others draw bits of their own, never those of another rank.
    """
    found = spread(param)
    if found is None:
        return 0
    mesh, dims = found
    placements: Any = param.placements  # pyright: ignore[reportAttributeAccessIssue]
    order = walked(local_view(param))
    if len(dims) == 1 and placements[dims[0]].is_shard(0) and order == sorted(order):
        rows = param.shape[0]
        first = min(rows, mesh.get_local_rank(dims[0]) * -(-rows // mesh.size(dims[0])))
        return -(-first * (param.numel() // rows) // 8) if rows else 0
    rank = 0
    for dim in dims:
        rank = rank * mesh.size(dim) + mesh.get_local_rank(dim)
    return rank * -(-param.numel() // 8)
