"""The CUDA C++ driver: one launch per bucket on torch's current stream, without synchronising."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import library

if TYPE_CHECKING:
    from ..launch import Launch


class _Cuda:
    """The opened library."""

    def __init__(self, opened: library.Library) -> None:
        self.library = opened
        self.tile: int = opened.function("tile", c_int)()
        table_and_tiles = c_void_p, c_int64, c_void_p, c_int
        launch = c_int, c_void_p
        arguments = *library.WORK, *table_and_tiles, c_void_p, c_int64, c_void_p, *launch
        self.step: dict[bool, Callable[..., int]] = {
            True: opened.function("step_exact", c_int, *arguments),
            False: opened.function("step_fast", c_int, *arguments),
        }
        self.square_sum = opened.function(
            "square_sum", c_int, c_int, c_int, *table_and_tiles, c_void_p, c_void_p, *launch
        )


@cache
def _cuda() -> _Cuda:
    opened = library.load("cuda")
    if isinstance(opened, str):
        raise RuntimeError(opened)
    return _Cuda(opened)


def unavailable() -> str | None:
    """None if the driver can run, else what is missing and how to get it."""
    if not torch.cuda.is_available():
        return "no CUDA device that torch can see; install a CUDA build of torch and a driver"
    opened = library.load("cuda")
    return opened if isinstance(opened, str) else None


def lacks(codec: str) -> bool:
    """Whether the library has no such codec."""
    opened = library.load("cuda")
    return isinstance(opened, str) or codec not in opened.codecs


def _run(function: Callable[..., int], bucket: Launch, *arguments: Any) -> None:
    """Calls a C function with the bucket's device and torch's current stream on it."""
    device = bucket.device.index
    stream = torch.cuda.current_stream(device).cuda_stream
    if device == torch.cuda.current_device():
        error = function(*arguments, device, stream)
    else:
        with torch.cuda.device(device):
            error = function(*arguments, device, stream)
    if error:
        raise RuntimeError(f"CUDA kernels for rule {bucket.rule.name!r} failed with error {error}")


def step(bucket: Launch) -> None:
    """Updates every tensor of the bucket whose row is active."""
    cuda, cached = _cuda(), bucket.cache.get("cuda")
    if cached is None:
        cached = bucket.cache["cuda"] = cuda.library.work(bucket)
    table, rows, tiles = bucket.table, bucket.rows, bucket.tiles(cuda.tile)
    _run(
        cuda.step[bucket.exact],
        bucket,
        *cached,
        table.data_ptr(),
        table.shape[1],
        tiles.data_ptr(),
        tiles.shape[0],
        rows.data_ptr(),
        rows.shape[1],
        library.layouts_of(bucket),
    )


def square_sum(bucket: Launch) -> Tensor:
    """Sum of the squares of all gradients in float64, in an order that depends on their sizes only."""
    cuda, table = _cuda(), bucket.table
    tiles = bucket.tiles(cuda.tile)
    sums = torch.empty(tiles.shape[0], dtype=torch.float64, device=bucket.device)
    _run(
        cuda.square_sum,
        bucket,
        cuda.library.codecs[bucket.grad.name],
        table.shape[0] - 1,
        table.data_ptr(),
        table.shape[1],
        tiles.data_ptr(),
        tiles.shape[0],
        library.layouts_of(bucket),
        sums.data_ptr(),
    )
    return sums.sum()
