"""The catalogue of codecs: every storage that a parameter, a gradient or a state may have."""

from __future__ import annotations

from .spec import Codec, Plane

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("fp32", (Plane("", "float32", 32),)),
        Codec("bf16", (Plane("", "bfloat16", 16),), relative_error=2.0**-9),
        Codec("fp16", (Plane("", "float16", 16),), relative_error=2.0**-11),
        Codec("fp64", (Plane("", "float64", 64),), compute="float64"),
    )
}

OF_DTYPE: dict[str, str] = {codec.planes[0].dtype: codec.name for codec in CODECS.values()}
"""The codec that stores a tensor of a torch dtype as it is."""
