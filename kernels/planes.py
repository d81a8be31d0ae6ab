"""A codec's planes in memory to tensors of values and back, outside of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import flat
from .reference.codecs import CODECS
from .reference.philox import Stream
from .spec import Codec

_NO_STREAM = Stream(0, 0, 0, 0)


def read(codec: Codec, planes: Sequence[Tensor], order: Tensor, out: Tensor) -> Tensor:
    """Writes into ``out`` what planes hold that run through memory in the order of ``order``."""
    values = CODECS[codec.name].decode([flat(plane, order).flatten() for plane in planes])
    target = flat(out, order)
    target.copy_(values[: out.numel()].view(target.shape))
    return out


def write(codec: Codec, planes: Sequence[Tensor], values: Tensor, order: Tensor, active: Any = None) -> None:
    """Encodes values into such planes, where ``active`` holds if it is a tensor."""
    encoded = CODECS[codec.name].encode(flat(values, order).flatten(), _NO_STREAM)
    for plane, new in zip(planes, encoded, strict=True):
        target = flat(plane, order)
        new = new.view(target.shape)
        target.copy_(torch.where(active, new, target) if isinstance(active, Tensor) else new)
