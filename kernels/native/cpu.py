"""The CPU driver: one C call per bucket, on torch's threads."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..codecs import OF_DTYPE
from . import library

if TYPE_CHECKING:
    from ..launch import Launch


GROUPS = range(2, 33)
"""Sizes of groups that ``nm_mask`` takes."""


class _Cpu:
    """The opened library and the instruction set in use."""

    def __init__(self, opened: library.Library) -> None:
        self.library = opened
        self.step = opened.function(
            "step", c_int, *library.WORK, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int
        )
        self.square_sum = opened.function(
            "square_sum", c_int, c_int, c_int, c_void_p, c_int64, c_void_p, c_int, c_int, c_void_p
        )
        tensor = c_void_p, c_int
        self.nm_mask = opened.function(
            "nm_mask", c_int, *tensor, c_int64, c_int, c_int, c_void_p, c_int, c_int
        )
        self.transposable_mask = opened.function(
            "transposable_mask", c_int, *tensor, c_int64, c_int64, c_void_p, c_int, c_int
        )
        name_of, runs = opened.function("isa", c_char_p, c_int), opened.function("runs", c_int, c_int)
        self.isas: dict[str, int] = {}
        index = 0
        while (name := name_of(index)) is not None:
            if runs(index):
                self.isas[name.decode()] = index
            index += 1
        self.isa = next(iter(self.isas.values()))


@cache
def _cpu() -> _Cpu:
    opened = library.load("cpu")
    if isinstance(opened, str):
        raise RuntimeError(opened)
    return _Cpu(opened)


def unavailable() -> str | None:
    """None if the driver can run, else what is missing and how to get it."""
    opened = library.load("cpu")
    return opened if isinstance(opened, str) else None


def isas() -> tuple[str, ...]:
    """The instruction sets that were compiled and run on this machine, best first."""
    return tuple(_cpu().isas)


@contextmanager
def _forced_isa(name: str) -> Generator[None]:
    """Runs another path than the best one: for tests."""
    cpu = _cpu()
    before, cpu.isa = cpu.isa, cpu.isas[name]
    try:
        yield
    finally:
        cpu.isa = before


def lacks(codec: str) -> bool:
    """Whether the library has no such codec."""
    opened = library.load("cpu")
    return isinstance(opened, str) or codec not in opened.codecs


def _check(error: int, bucket: Launch) -> None:
    if error:
        raise RuntimeError(f"native step failed with error {error} for rule {bucket.rule.name!r}")


def step(bucket: Launch) -> None:
    """Updates every tensor of the bucket whose row is active."""
    cpu, cached = _cpu(), bucket.cache.get("native")
    if cached is None:
        cached = bucket.cache["native"] = (
            *cpu.library.work(bucket),
            bucket.table.data_ptr(),
            bucket.table.shape[1],
            bucket.rows.data_ptr(),
            bucket.rows.shape[1],
            library.layouts_of(bucket),
        )
    error = cpu.step(*cached, torch.get_num_threads(), cpu.isa)
    _check(error, bucket)


def square_sum(bucket: Launch) -> Tensor:
    """Sum of the squares of all gradients in float64, the same for any number of threads."""
    cpu, table = _cpu(), bucket.table
    total = torch.empty((), dtype=torch.float64, device="cpu")
    error = cpu.square_sum(
        cpu.library.codecs[bucket.grad.name],
        table.shape[0] - 1,
        table.data_ptr(),
        table.shape[1],
        library.layouts_of(bucket),
        torch.get_num_threads(),
        cpu.isa,
        total.data_ptr(),
    )
    _check(error, bucket)
    return total


def _packed_mask(function: Callable[..., int], x: Tensor, *arguments: int) -> Tensor:
    """The bits that a C function writes for a contiguous tensor."""
    assert x.is_contiguous()
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device="cpu")
    codec = _cpu().library.codecs[OF_DTYPE[str(x.dtype).removeprefix("torch.")]]
    error = function(x.data_ptr(), codec, *arguments, bits.data_ptr(), torch.get_num_threads(), _cpu().isa)
    if error:
        raise RuntimeError(f"native mask failed with error {error} for shape {tuple(x.shape)}, {arguments}")
    return bits


def nm_mask(x: Tensor, group: int, kept: int) -> Tensor:
    """Which values are among the ``kept`` largest of their ``group`` of neighbours: 1 bit for each."""
    return _packed_mask(_cpu().nm_mask, x, x.numel(), group, kept)


def transposable_mask(x: Tensor) -> Tensor:
    """The best mask of 4x4 blocks with two values in every row and column: 1 bit for each."""
    return _packed_mask(_cpu().transposable_mask, x, *x.shape)
