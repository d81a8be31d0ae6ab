"""The vocabulary of the house: what a codec, a slot and a rule are.

Imports neither torch nor triton, so that tools can read the catalogues anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

Hyper = Mapping[str, Any]
"""Hyperparameters of one parameter group: Python floats, or float64 tensors on a device."""


ROW_HEADER = 4
"""Words of a row before the rule's scalars: ``active``, ``g_scale``, and two integers, seed and step."""


@dataclass(frozen=True)
class Plane:
    """One tensor in memory that a codec keeps: ``bits`` wide entries, each for ``per`` fp32 values."""

    suffix: str
    dtype: str
    bits: int
    per: int = 1


@dataclass(frozen=True)
class Codec:
    """How fp32 values live in memory.

    The first plane of a parameter's codec is the parameter itself; every further plane, and every
    plane of a state, is dense and in the parameter's memory order.

    Attributes:
        planes: the tensors in memory.
        compute: dtype of the values in registers.
        relative_error: largest error of a value relative to itself, or to the largest of its block.
        block: neighbouring values that share a scale; 1 if every value stands for itself.
        lookup: name of the constant table (kernels/lookup.py) that kernels need beside the planes.
        unsigned: the codec that takes its place for states that are never negative.
        random: whether encoding rounds stochastically.
        write_only: whether decoding gives zeros without a look at memory.
        signed_scale: whether a block's scale has the sign of its largest magnitude.
    """

    name: str
    planes: tuple[Plane, ...]
    compute: str = "float32"
    relative_error: float = 0.0
    block: int = 1
    lookup: str | None = None
    unsigned: str | None = None
    random: bool = False
    write_only: bool = False
    signed_scale: bool = False

    @property
    def bytes_per_value(self) -> float:
        """Bytes in memory for one value, all planes together."""
        return sum(plane.bits / 8 / plane.per for plane in self.planes)

    @property
    def columns(self) -> int:
        """Addresses that a kernel is given: the planes', then the lookup table's."""
        return len(self.planes) + (self.lookup is not None)


@dataclass(frozen=True)
class Slot:
    """A state tensor of a rule, under torch.optim's own key.

    ``codec`` names the only storage that it may have; ``"weights"`` stands for that of the parameter.
    """

    name: str
    signed: bool = True
    codec: str | None = None


class Per(Enum):
    """What has one entry of a state that is kept for whole rows or matrices, always in fp32."""

    ROW = "row"
    MATRIX = "matrix"

    def shape(self, param: tuple[int, ...]) -> tuple[int, ...]:
        """Of the state: the parameter's with ones; beyond three dimensions, of ``[first, all others]``."""
        outer = param[:-1] if len(param) <= 3 else param[:1]
        return (*outer, 1) if self is Per.ROW else (*outer[:-1], 1, 1)


@dataclass(frozen=True)
class Rule:
    """What an optimizer does to ``p, g`` and its states, given a row of scalars.

    ``row(hyper, step)`` returns the values of ``scalars`` in order. It uses only ``+ - * / **``, so
    that the same function prepares a row from Python floats on the host and from float64 tensors on
    a device. ``shared`` are states of whole rows or matrices, which no kernel sees.

    A masked rule (kernels/masking.py) has an ``inner`` one. ``group`` neighbours in memory compete for a
    place in its mask; 0 if the mask is only read.
    """

    name: str
    slots: tuple[Slot, ...]
    scalars: tuple[str, ...]
    row: Callable[[Hyper, Any], tuple[Any, ...]]
    shared: tuple[tuple[str, Per], ...] = ()
    inner: Rule | None = None
    group: int = 0

    @property
    def row_length(self) -> int:
        """Words in a row: the header, then the rule's own scalars."""
        return ROW_HEADER + len(self.scalars)


def bytes_moved(rule: Rule, param: Codec, grad: Codec, states: tuple[Codec, ...]) -> tuple[float, float]:
    """Bytes a one-pass step reads and writes for one parameter element.

    >>> from fused_optim.kernels.codecs import CODECS
    >>> from fused_optim.kernels.rules import RULES
    >>> fp32 = CODECS["fp32"]
    >>> bytes_moved(RULES["adam"], fp32, fp32, (fp32, fp32))
    (16.0, 12.0)
    """
    assert len(states) == len(rule.slots)
    written = sum(codec.bytes_per_value for codec in (param, *states))
    # Beside weights that are a state the parameter is only written.
    read_too = () if any(slot.codec == "weights" for slot in rule.slots) else (param,)
    read = sum(codec.bytes_per_value for codec in (*read_too, grad, *states) if not codec.write_only)
    return read, written
