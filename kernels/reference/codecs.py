"""The codecs in plain torch: planes in memory to values and back, what every backend must equal bit for bit.

Planes and values are flat, in memory order. ``decode(planes) -> values``; ``encode(values, stream) ->
planes``, new tensors; ``stream`` names the random bits of codecs that round stochastically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import BLOCK_CODECS
from .philox import Stream, random_16_bits

Planes = Sequence[Tensor]
QUIET_NAN = 0x7FC00000


class ReferenceCodec(NamedTuple):
    """Both directions of a codec."""

    decode: Callable[[Planes], Tensor]
    encode: Callable[[Tensor, Stream], Planes]


def _plain(stored: torch.dtype, compute: torch.dtype = torch.float32) -> ReferenceCodec:
    return ReferenceCodec(lambda planes: planes[0].to(compute), lambda x, _: (x.to(stored),))


def _bits(x: Tensor) -> Tensor:
    """The bits of fp32 values, all NaNs made one."""
    return torch.where(x.isnan(), QUIET_NAN, x.view(torch.int32))


def _kahan(stored: torch.dtype) -> ReferenceCodec:
    """A rounded value and, in the same format, what the rounding lost."""

    def decode(planes: Planes) -> Tensor:
        return planes[0].float() + planes[1].float()

    def encode(x: Tensor, _: Stream) -> Planes:
        p = x.to(stored)
        lost = x - p.float()
        return p, torch.where(p.isfinite(), lost, 0.0).to(stored)

    return ReferenceCodec(decode, encode)


def _split(kept: int, low: torch.dtype) -> ReferenceCodec:
    """The upper 16 bits, rounded half up so that they are a bf16 weight, and ``kept`` signed bits below."""
    dropped = 16 - kept

    def decode(planes: Planes) -> Tensor:
        # In place: memory for every intermediate result would take as long as the arithmetic.
        bits = planes[0].view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
        return bits.add_(planes[1], alpha=1 << dropped).view(torch.float32)

    def encode(x: Tensor, _: Stream) -> Planes:
        bits = _bits(x)
        if dropped:
            half = (1 << (dropped - 1)) - 1
            rounded = bits + half + ((bits >> dropped) & 1)
            bits = torch.where(x.isfinite(), rounded, bits) & ~((1 << dropped) - 1)
        high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
        return high, (bits >> dropped).to(low)

    return ReferenceCodec(decode, encode)


_BITS = torch.arange(8, dtype=torch.uint8, device="cpu")


def _mask_decode(planes: Planes) -> Tensor:
    return ((planes[0].unsqueeze(1) >> _BITS.to(planes[0].device)) & 1).flatten().float()


def _mask_encode(x: Tensor, _: Stream) -> Planes:
    """Eight neighbours in a byte, the first in its lowest bit."""
    set_ = torch.nn.functional.pad((x != 0).to(torch.uint8), (0, -len(x) % 8)).view(-1, 8)
    return ((set_ << _BITS.to(x.device)).sum(1, dtype=torch.uint8),)


def _stochastic_bf16(x: Tensor, stream: Stream) -> Planes:
    random = random_16_bits(stream, x.numel(), x.device).int()
    bits = _bits(x)
    bits = torch.where(x.isfinite(), bits + random, bits)
    return ((bits >> 16).to(torch.int16).view(torch.bfloat16),)


CODECS: dict[str, ReferenceCodec] = {
    "fp32": _plain(torch.float32),
    "bf16": _plain(torch.bfloat16),
    "fp16": _plain(torch.float16),
    "fp64": _plain(torch.float64, torch.float64),
    "mask": ReferenceCodec(_mask_decode, _mask_encode),
    "blank": _plain(torch.float32)._replace(decode=lambda planes: torch.zeros_like(planes[0])),
    "bf16_sr": _plain(torch.bfloat16)._replace(encode=_stochastic_bf16),
    "bf16_kahan": _kahan(torch.bfloat16),
    "fp16_kahan": _kahan(torch.float16),
    "bf16_split8": _split(8, torch.int8),
    "bf16_split16": _split(16, torch.int16),
    **{name: ReferenceCodec(codec.decode, codec.encode) for name, codec in BLOCK_CODECS.items()},
}
