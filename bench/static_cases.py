"""Which rules and storages ``python -m bench static`` compiles."""

from __future__ import annotations

from fused_optim.kernels.codecs import CODECS, OF_DTYPE, PARAM_CODECS, STATE_CODECS
from fused_optim.kernels.masking import GROUPS

PLAIN = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "fp32", "bf16"),
    ("bf16", "bf16", "bf16"),
    ("fp16", "fp32", "fp16"),
    ("fp16", "fp16", "fp16"),
    ("fp32", "bf16", "fp32"),
    ("fp32", "fp32", "bf16"),
)
CODED = (
    ("fp32", "int8", "fp32"),
    ("fp32", "int8_companded", "fp32"),
    ("fp32", "fp8", "fp32"),
    ("fp32", "int4", "fp32"),
    ("bf16_split8", "int8_companded", "bf16"),
    ("bf16_split16", "bf16_sr", "bf16"),
    ("bf16_kahan", "bf16", "bf16"),
    ("fp16_kahan", "fp16", "fp16"),
    ("bf16_sr", "int4", "bf16"),
)
RECOMMENDED = (
    ("bf16", "int8", "bf16"),
    ("bf16_split8", "int8", "bf16"),
    ("bf16_split8", "int4", "bf16"),
)
STORAGES = PLAIN + CODED + RECOMMENDED
"""(parameter, every state, gradient): what people train with."""

IN_PLACE = ("fp32", "fp32", "fp32", "mask", "fp32")
MIXED = ("bf16", "fp32", "fp32", "mask", "bf16")
DENSE = ("bf16", "int8", "int8_unsigned", "mask", "bf16_split16", "bf16")
MASKED = (
    *(("adam", group, IN_PLACE) for group in (0, *GROUPS)),
    *(("cast_adam", group, IN_PLACE) for group in (0, 4)),
    ("adam", 4, MIXED),
    ("adam", 4, ("bf16", "fp32", "fp32", "mask", "fp32", "bf16")),
    ("adam", 4, DENSE),
    ("adam", 16, DENSE),
    ("adam", 4, ("bf16_sr", "int4", "int4_unsigned", "mask", "bf16")),
    ("sgd_momentum", 4, ("bf16", "bf16", "mask", "bf16_split8", "bf16")),
    ("lion", 4, ("bf16", "bf16", "mask", "bf16")),
    ("lion", 16, ("bf16", "bf16", "mask", "bf16")),
)
"""Rule, size of groups, codecs: parameter, states (the mask and dense weights last), gradient."""

FLOATS = tuple(name for name in OF_DTYPE.values() if CODECS[name].compute == "float32")
PARAMS = tuple(name for name in PARAM_CODECS if CODECS[name].compute == "float32")
STATES = tuple(name for name in STATE_CODECS if CODECS[name].compute == "float32")
