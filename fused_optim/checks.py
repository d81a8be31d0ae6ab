"""Checks of what an optimizer is given: its arguments, and where its parameters are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

from .kernels.aliasing import find_shared, overlaps_itself


def arguments_of(cls: type, base: type) -> list[str]:
    """The names that the constructor of a class takes by keyword, with those of its bases below ``base``."""
    order = cls.__mro__
    found = [
        name
        for each in order[: order.index(base)]
        for name, argument in signature(each.__init__).parameters.items()
        if argument.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    ]
    return [name for name in dict.fromkeys(found) if name not in ("self", "params")]


def list_params(group: Any) -> None:
    """Makes a list of a group's iterator, as torch does, so that checks do not use it up."""
    if isinstance(group, dict) and not isinstance(group.get("params"), Tensor | set | None):
        group["params"] = list(group["params"])


def check_memory(name: str, param: Tensor) -> None:
    """Refuses what a step cannot change yet; an optimizer may be made of it, since FSDP2 fills it in place.

    Raises:
        TypeError: a tensor on the meta device.
    """
    if param.is_meta:
        raise TypeError(
            f"{name} is on the meta device and has no memory for a step to change; call "
            "module.to_empty(device=...) and initialise it, then make the optimizer: the module may hold "
            "other parameters by then"
        )


def check_apart(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Refuses parameters that a step would change twice.

    Raises:
        ValueError: elements of one, or of two, share memory.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if overlaps_itself(tensor):
            raise ValueError(
                f"{name} has elements that share memory (strides {tensor.stride()} "
                f"for shape {tuple(tensor.shape)}); make it a parameter of its own with .clone()"
            )
    shared = find_shared(tensors)
    if shared is not None:
        one, other = (names[index] for index in shared)
        raise ValueError(f"{one} and {other} share memory and cannot both be updated; pass the tensor once")
