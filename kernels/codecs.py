"""The catalogue of codecs: every storage that a parameter, a gradient or a state may have."""

from __future__ import annotations

from typing import Any

from .spec import Codec, Plane

_BF16, _FP16 = Plane("", "bfloat16", 16), Plane("", "float16", 16)


def _blocks(
    name: str,
    codes: Plane,
    block: int,
    scale: str,
    error: float,
    unsigned: str | None = None,
    **further: Any,
) -> Codec:
    """Codes of 8 or 4 bits, and one scale for each ``block`` of neighbouring values."""
    bits = {"float32": 32, "bfloat16": 16}[scale]
    planes = codes, Plane(".scale", scale, bits, block)
    return Codec(name, planes, relative_error=error, block=block, unsigned=unsigned, **further)


_BYTE, _SIGNED_BYTE, _TWO_CODES = Plane("", "uint8", 8), Plane("", "int8", 8), Plane("", "uint8", 8, 2)

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("fp32", (Plane("", "float32", 32),)),
        Codec("bf16", (_BF16,), relative_error=2.0**-8),
        Codec("fp16", (_FP16,), relative_error=2.0**-11),
        Codec("mask", (Plane("", "uint8", 8, 8),)),
        Codec("blank", (Plane("", "float32", 32),), write_only=True),
        Codec("fp64", (Plane("", "float64", 64),), compute="float64"),
        Codec("bf16_sr", (_BF16,), relative_error=2.0**-7, random=True),
        Codec("bf16_kahan", (_BF16, Plane(".compensation", "bfloat16", 16)), relative_error=2.0**-17),
        Codec("fp16_kahan", (_FP16, Plane(".compensation", "float16", 16)), relative_error=2.0**-23),
        Codec("bf16_split8", (_BF16, Plane(".lo", "int8", 8)), relative_error=2.0**-16),
        Codec("bf16_split16", (_BF16, Plane(".lo", "int16", 16))),
        _blocks("int8", _BYTE, 256, "float32", 0.0071, "int8_unsigned", lookup="dynamic_signed"),
        _blocks("int8_unsigned", _BYTE, 256, "float32", 0.0036, lookup="dynamic_unsigned"),
        # Scales of second moments in fp32: in bf16 a decay of 0.001 would be lost, and no code changes by so
        # little either.
        _blocks("int8_companded", _SIGNED_BYTE, 64, "bfloat16", 0.01, "int8_companded_unsigned"),
        _blocks("int8_companded_unsigned", _BYTE, 128, "float32", 0.006),
        _blocks("fp8", _BYTE, 256, "float32", 0.036, "fp8_unsigned"),
        _blocks("fp8_unsigned", _BYTE, 256, "float32", 0.036),
        _blocks("int4", _TWO_CODES, 128, "float32", 0.12, "int4_unsigned", signed_scale=True),
        _blocks("int4_unsigned", _TWO_CODES, 128, "float32", 0.12),
    )
}

OF_DTYPE: dict[str, str] = {CODECS[name].planes[0].dtype: name for name in ("fp32", "bf16", "fp16", "fp64")}
"""The codec that stores a tensor of a torch dtype as it is."""

BLANK = CODECS["blank"]
"""Where a launch writes its update instead of adding it to a parameter: zeros to begin with."""

_HIDDEN = {BLANK.name, "mask", *(codec.unsigned for codec in CODECS.values())}

STATE_CODECS: tuple[str, ...] = tuple(name for name in CODECS if name not in _HIDDEN)
"""What ``state_codec`` may name; a state that is never negative gets the ``unsigned`` variant by itself."""

PARAM_CODECS: tuple[str, ...] = tuple(name for name in STATE_CODECS if CODECS[name].block == 1)
"""What ``param_codec`` may name."""


def for_slot(name: str, signed: bool) -> Codec:
    """The codec of a state: the variant for states that are never negative, where there is one."""
    codec = CODECS[name]
    return codec if signed or codec.unsigned is None else CODECS[codec.unsigned]
