"""Codecs of 8 and 4 bits in plain torch: a code for each value, a scale for each block of neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import CODECS
from ..lookup import SIGNED_FOUR_BITS, dynamic_map, magnitudes, middles
from .rules import sqrt

_INFINITY, _SMALLEST_NORMAL = 0x7F800000, 0x00800000


@dataclass(frozen=True)
class BlockCodec:
    """``value`` of a code and nearest ``code`` of a value, both in units of the block's scale.

    Codes are int32 tensors.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    code: Callable[[Tensor], Tensor]

    def decode(self, planes: Sequence[Tensor]) -> Tensor:
        """The values of flat planes."""
        codec = CODECS[self.name]
        codes, scales = planes[0], planes[1].float()
        if codec.planes[0].per == 2:
            codes = torch.stack([codes & 15, codes >> 4], 1).flatten()
        scale = scales.repeat_interleave(codec.block)
        # An odd number of 4-bit codes ends with a nibble that nobody asks for.
        count = min(len(codes), len(scale))
        return self.value(codes[:count].int()) * scale[:count]

    def encode(self, x: Tensor, _: object = None) -> Sequence[Tensor]:
        """Flat planes for flat values."""
        codec = CODECS[self.name]
        codes_plane, scale_plane = codec.planes
        blocks = torch.nn.functional.pad(x, (0, -len(x) % codec.block)).view(-1, codec.block)
        scale = self._largest(blocks).to(getattr(torch, scale_plane.dtype))
        wide = scale.float().unsqueeze(1)
        alive = (wide != 0) & wide.isfinite()
        inverse = torch.where(alive, torch.ones_like(wide) / wide, 0.0)
        n = torch.where(alive, blocks * inverse, 0.0)
        codes = self.code(n.flatten()[: len(x)])
        if codes_plane.per == 2:
            pairs = torch.nn.functional.pad(codes, (0, len(x) % 2)).view(-1, 2)
            codes = pairs[:, 0] | (pairs[:, 1] << 4)
        return codes.to(getattr(torch, codes_plane.dtype)), scale

    def _largest(self, blocks: Tensor) -> Tensor:
        """Each block's largest magnitude; NaN if there is one; 0 for denormals."""
        bits = blocks.view(torch.int32) & 0x7FFFFFFF
        top = bits.amax(1)
        largest = torch.where(top < _SMALLEST_NORMAL, 0, top).view(torch.float32)
        largest = torch.where(top > _INFINITY, torch.nan, largest)
        if not CODECS[self.name].signed_scale:
            return largest
        positive = ((bits == top.unsqueeze(1)) & (blocks.view(torch.int32) >= 0)).any(1)
        return torch.where(positive, largest, -largest)


def _dynamic_value(signed: bool) -> Callable[[Tensor], Tensor]:
    values = torch.from_numpy(dynamic_map(signed))
    return lambda code: values.to(code.device)[code]


def _nearest(ascending_middles: Tensor, n: Tensor) -> Tensor:
    return torch.bucketize(n, ascending_middles.to(n.device)).int()


def _dynamic_signed_code() -> Callable[[Tensor], Tensor]:
    bounds = torch.from_numpy(middles(magnitudes(True)))

    def code(n: Tensor) -> Tensor:
        index = _nearest(bounds, n.abs())
        return torch.where(n < 0, 127 - index.clamp(max=127), 127 + index)

    return code


def _keep_positive(n: Tensor, code: Tensor) -> Tensor:
    """A second moment that is not zero never becomes zero: dividing by it would blow the step up."""
    return torch.where(n > 0, code.clamp(min=1), code)


def _dynamic_unsigned_code() -> Callable[[Tensor], Tensor]:
    bounds = torch.from_numpy(middles(magnitudes(False)))
    return lambda n: _keep_positive(n, _nearest(bounds, n))


def _softsign_value(code: Tensor) -> Tensor:
    q = code.float()
    return q / (254.0 - q.abs())


def _softsign_code(n: Tensor) -> Tensor:
    return ((254.0 * n) / (1.0 + n.abs())).round().clamp(-127, 127).int()


def _square_value(code: Tensor) -> Tensor:
    return (code * code).float() * torch.tensor(1 / 65025, dtype=torch.float32, device="cpu")


def _root_code(n: Tensor) -> Tensor:
    return _keep_positive(n, (255.0 * sqrt(n.clamp(min=0.0))).round().clamp(max=255).int())


_ONE_448TH = torch.tensor(1 / 448, dtype=torch.float32, device="cpu")


def _e4m3_value(code: Tensor) -> Tensor:
    return code.to(torch.uint8).view(torch.float8_e4m3fn).float() * _ONE_448TH.to(code.device)


def _e4m3_code(n: Tensor) -> Tensor:
    return (n * 448.0).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8).int()


def _e4m3_unsigned_code(n: Tensor) -> Tensor:
    return _keep_positive(n, _e4m3_code(n.clamp(min=0.0)))


_FOUR_BITS = torch.tensor(SIGNED_FOUR_BITS, dtype=torch.float32, device="cpu")
_FOUR_BIT_MIDDLES = (_FOUR_BITS[1:] + _FOUR_BITS[:-1]) / 2


def _four_bit_value(code: Tensor) -> Tensor:
    return _FOUR_BITS.to(code.device)[code]


def _fourth_power_value(code: Tensor) -> Tensor:
    square = (code + 1) * (code + 1)
    return (square * square).float() / 65536.0


def _fourth_root_code(n: Tensor) -> Tensor:
    root = sqrt(sqrt(n.clamp(min=0.0)))
    return (16.0 * root).round().clamp(1, 16).int() - 1


BLOCK_CODECS: dict[str, BlockCodec] = {
    codec.name: codec
    for codec in (
        BlockCodec("int8", _dynamic_value(True), _dynamic_signed_code()),
        BlockCodec("int8_unsigned", _dynamic_value(False), _dynamic_unsigned_code()),
        BlockCodec("int8_companded", _softsign_value, _softsign_code),
        BlockCodec("int8_companded_unsigned", _square_value, _root_code),
        BlockCodec("fp8", _e4m3_value, _e4m3_code),
        BlockCodec("fp8_unsigned", _e4m3_value, _e4m3_unsigned_code),
        BlockCodec("int4", _four_bit_value, lambda n: _nearest(_FOUR_BIT_MIDDLES, n)),
        BlockCodec("int4_unsigned", _fourth_power_value, _fourth_root_code),
    )
}
