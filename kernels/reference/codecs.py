"""The codecs in plain torch: planes to fp32 (or fp64) values and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceCodec(NamedTuple):
    """``decode(planes) -> values`` and ``encode(values, planes)``, in place."""

    decode: Callable[[Sequence[Tensor]], Tensor]
    encode: Callable[[Tensor, Sequence[Tensor]], None]


def _plain(compute: torch.dtype) -> ReferenceCodec:
    def decode(planes: Sequence[Tensor]) -> Tensor:
        return planes[0].to(compute)

    def encode(values: Tensor, planes: Sequence[Tensor]) -> None:
        planes[0].copy_(values)

    return ReferenceCodec(decode, encode)


CODECS: dict[str, ReferenceCodec] = {
    "fp32": _plain(torch.float32),
    "bf16": _plain(torch.float32),
    "fp16": _plain(torch.float32),
    "fp64": _plain(torch.float64),
}
