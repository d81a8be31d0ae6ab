"""Masks by compiled functions, where one fits the tensor: packed bits, eight weights a byte."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .layout import flat, follows, memory_order, walked
from .native import cpu

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _module(w: Tensor) -> Any:
    """What has compiled functions for tensors like this one."""
    if w.dtype not in _DTYPES or not w.numel() or not follows(w, w):
        return None
    if w.device.type == "cpu":
        return cpu if cpu.unavailable() is None else None
    driver = importlib.import_module(".triton.driver", __package__)
    if driver.unavailable(w.device.type) is not None:
        return None
    return importlib.import_module(".triton.masks", __package__)


def of_groups(w: Tensor, size: int, kept: int, dim: int) -> Tensor | None:
    """Which weights are among the ``kept`` largest of their group along a dimension; None if nothing fits."""
    module = _module(w) if walked(w)[-1:] == [dim] else None
    if module is None or (module is not cpu and size & (size - 1)):
        return None
    return unpack(module.nm_mask(flat(w, w).detach().reshape(-1), size, kept), w)


def of_blocks(w: Tensor) -> Tensor | None:
    """The best masks of 4x4 blocks; None if nothing fits."""
    module = _module(w) if w.is_contiguous() else None
    if module is None:
        return None
    return unpack(module.transposable_mask(w.detach().view(-1, w.shape[-1])), w)


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """A bool tensor of the shape and in the memory order of ``like``."""
    # Every byte eight times, of which each keeps one bit.
    spread = (bits.to(torch.int64) * 0x0101010101010101) & (0x8040201008040201 - (1 << 64))
    places = spread.view(torch.uint8)[: like.numel()] != 0
    order = memory_order(like)
    back = sorted(range(like.ndim), key=order.__getitem__)
    return places.view([like.shape[dim] for dim in order]).permute(back)
