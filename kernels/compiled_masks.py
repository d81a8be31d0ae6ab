"""Masks by compiled functions, where one fits the tensor: packed bits, eight weights a byte."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import dispatch
from .layout import flat, follows, memory_order, walked

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _module(w: Tensor) -> Any:
    """What has compiled functions for tensors like this one."""
    # Wrappers have no memory of their own: neither shards nor what torch traces.
    plain = not is_traceable_wrapper_subclass(w) and w.numel() and w.data_ptr()
    fits = w.dtype in _DTYPES and plain and follows(w, w)
    return dispatch.mask_functions(w.device.type) if fits else None


def of_groups(w: Tensor, size: int, kept: int, dim: int) -> Tensor | None:
    """Which weights are among the ``kept`` largest of their group along a dimension; None if nothing fits."""
    module = _module(w) if walked(w)[-1:] == [dim] else None
    if module is None or size not in module.GROUPS:
        return None
    return unpack(module.nm_mask(flat(w, w).detach().reshape(-1), size, kept), w)


def of_blocks(w: Tensor) -> Tensor | None:
    """The best masks of 4x4 blocks; None if nothing fits."""
    module = _module(w) if w.is_contiguous() else None
    if module is None:
        return None
    return unpack(module.transposable_mask(w.detach().view(-1, w.shape[-1])), w)


@cache
def _bytes_of(device: torch.device) -> Tensor:
    """Of every byte its eight bits as bytes, the lowest first: 256 integers."""
    bits = torch.arange(256, device="cpu").unsqueeze(1) >> torch.arange(8, device="cpu") & 1
    return bits.to(torch.uint8).view(torch.int64).flatten().to(device)


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """A bool tensor of the shape and in the memory order of ``like``."""
    places = _bytes_of(bits.device).index_select(0, bits.int()).view(torch.bool)[: like.numel()]
    order = memory_order(like)
    back = sorted(range(like.ndim), key=order.__getitem__)
    return places.view([like.shape[dim] for dim in order]).permute(back)
