"""Masks of whole tensors, as planes of eight weights a byte: for groups and blocks that no step can mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codecs import OF_DTYPE
from ..masking import block_ways
from . import codecs
from .arithmetic import bits_of, float_of
from .masking import largest_of_groups, mask_encode, split
from .tile import offsets

INFINITY = tl.constexpr(0x7F800000)
WARPS = 4
GROUPS = (2, 4, 8, 16, 32)
"""Sizes of groups that ``nm_mask`` takes."""


WAYS = tl.constexpr(block_ways())


@triton.jit
def _mask_groups(x, out, place, kept, DECODE: tl.constexpr, GROUP: tl.constexpr, SPREAD: tl.constexpr):
    values = DECODE((x,), (place, place), SPREAD, None)
    bits = largest_of_groups(values, place[2], kept, GROUP, SPREAD[0])
    mask_encode(bits, (out,), (place, place), None, SPREAD, None)


@triton.jit(do_not_specialize=["n", "kept"])
def groups_kernel(
    x, out, n, kept,
    DECODE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * TILE
    count = tl.minimum(n - start, TILE).to(tl.int32)
    offs = offsets(TILE, 32 * SPREAD[0], SPREAD[1])
    if count == TILE:
        _mask_groups(x, out, (start, offs, None, None), kept, DECODE, GROUP, SPREAD)
    else:
        _mask_groups(x, out, (start, offs, offs < count, count), kept, DECODE, GROUP, SPREAD)


@triton.jit
def _row(x, start, columns, DECODE: tl.constexpr, BLOCKS: tl.constexpr):
    """Magnitudes of a row of blocks, as the first, the second ... of each; a NaN counts as zero."""
    offs = tl.arange(0, 4 * BLOCKS)
    place = (start, offs, offs < columns)
    bits = bits_of(DECODE((x,), (place, place), (1, None), None)) & 0x7FFFFFFF
    return split(float_of(tl.where(bits > INFINITY, 0, bits)), 4)


@triton.jit
def _sum(magnitudes, WAY: tl.constexpr):
    """What a mask keeps, added in the order of its bits."""
    total = 0.0
    for place in tl.static_range(16):
        if WAY >> place & 1:
            total += magnitudes[place]
    return total


@triton.jit(do_not_specialize=["strips"])
def blocks_kernel(x, out, columns, strips, DECODE: tl.constexpr, BLOCKS: tl.constexpr):
    """The best way of each block of four rows, as 16 bits; a strip is ``BLOCKS`` blocks side by side."""
    row, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    first = strip * (4 * BLOCKS)
    start = row.to(tl.int64) * 4 * columns + first
    magnitudes = ()
    for i in tl.static_range(4):
        magnitudes += _row(x, start + i * columns, columns - first, DECODE, BLOCKS)
    # Sums that begin alike are computed once.
    M: tl.constexpr = WAYS
    best, bits = _sum(magnitudes, M[0]), M[0]
    for i in tl.static_range(1, 90):
        total = _sum(magnitudes, M[i])
        bits = tl.where(total > best, M[i], bits)
        best = tl.maximum(best, total)
    block = first // 4 + tl.arange(0, BLOCKS)
    pointers = out + row.to(tl.int64) * (columns // 4) + block
    tl.store(pointers, bits.to(tl.int16), mask=block < columns // 4)


def _decode(x: Tensor) -> Any:
    assert x.is_contiguous(), x.stride()
    return getattr(codecs, f"{OF_DTYPE[str(x.dtype).removeprefix('torch.')]}_decode")


def _launch(kernel: Any, programs: int, device: torch.device, *arguments: Any) -> None:
    if device.type == "cpu":
        with np.errstate(all="ignore"):
            kernel[(programs,)](*arguments)
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, num_warps=WARPS, enable_fp_fusion=False)


def nm_mask(x: Tensor, group: int, kept: int) -> Tensor:
    """A plane: which of a contiguous tensor's weights are among the ``kept`` largest of ``group`` neighbours.

    Groups may have up to 32 members, a power of two; the last one may have fewer.
    """
    assert group in GROUPS, group
    out = torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=x.device)
    vector = 16 // x.itemsize if x.data_ptr() % 16 == 0 else 1
    if x.numel():
        arguments = (x, out, x.numel(), kept, _decode(x), group, tile := 1024, (vector, WARPS))
        _launch(groups_kernel, -(-x.numel() // tile), x.device, *arguments)
    return out


def transposable_mask(x: Tensor) -> Tensor:
    """A plane: of every 4x4 block of ``[..., 4 m, 4 n]`` weights the best 8, two of each row and column.

    Best is the largest sum of magnitudes, added in the order of memory; of equal ones the first, read as a
    number whose bit ``i`` stands for a block's weight ``i``. A NaN counts as zero.
    """
    rows, columns = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    assert x.shape[-2] % 4 == 0 and columns % 4 == 0, x.shape
    ways = torch.empty(rows // 4, 1, columns // 4, dtype=torch.int16, device=x.device)
    if x.numel():
        strips = -(-columns // (4 * (blocks := 128)))
        arguments = (x, ways, columns, strips, _decode(x), blocks)
        _launch(blocks_kernel, rows // 4 * strips, x.device, *arguments)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=x.device).view(4, 1)
    low, high = (ways >> shifts & 15).view(-1, 2).unbind(1)
    return (low | high << 4).to(torch.uint8)
