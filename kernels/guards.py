"""Whether tensors and dictionaries still are what a plan was made for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from .native.objects import Entries, objects

try:
    # What torch.compile's guards use: C++ compares 600 tensors in about 20 us, where Python takes 150.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a torch that moved them
    TensorGuards = None

_traits = attrgetter("dtype", "shape", "device", "layout")


class PythonGuards:
    """Type, dtype, device, flags, sizes and strides of tensors, compared in Python."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._expected = self._read(tensors)

    @staticmethod
    def _read(tensors: Sequence[Any]) -> tuple[list[Any], ...]:
        flags = list(map(Tensor.is_neg, tensors)), list(map(Tensor.is_conj, tensors))
        return (
            list(map(type, tensors)),
            list(map(_traits, tensors)),
            list(map(Tensor.stride, tensors)),
            *flags,
        )

    def check(self, tensors: Sequence[Any]) -> bool:
        """Whether every tensor has the traits of the one in its place; False for None."""
        try:
            return self._read(tensors) == self._expected
        except (TypeError, RuntimeError):
            return False


class NativeGuards:
    """The same in one C++ call; it also compares ``requires_grad``."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        assert TensorGuards is not None
        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def check(self, tensors: Sequence[Any]) -> bool:
        """Whether every tensor has the traits of the one in its place; False for None."""
        try:
            return self._guards.check(*tensors)
        except (TypeError, ValueError):
            return False


class PythonDictGuards:
    """The objects in dictionaries, compared one by one."""

    def __init__(self, dicts: Sequence[dict[Any, Any]]) -> None:
        self._dicts = dicts
        self._expected = self._read()

    def _read(self) -> list[Any]:
        return list(chain.from_iterable(chain(d.keys(), d.values()) for d in self._dicts))

    def check(self) -> bool:
        """Whether every dictionary holds the same objects under the same keys."""
        found = self._read()
        return len(found) == len(self._expected) and all(map(is_, found, self._expected))


class NativeDictGuards(PythonDictGuards):
    """The same in one C call."""

    def __init__(self, dicts: Sequence[dict[Any, Any]]) -> None:
        super().__init__(dicts)
        functions = objects()
        self._entries = None if functions is None else Entries(dicts, functions)

    def check(self) -> bool:
        """Whether every dictionary holds the same objects under the same keys."""
        return super().check() if self._entries is None else self._entries.same()


def same_objects(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    if len(one) != len(other):
        return False
    functions = objects()
    if functions is None or type(one) is not list or type(other) is not list:
        return all(map(is_, one, other))
    return functions.same_objects(functions.functions, one, other, len(one)) == 1


Guards = PythonGuards if TensorGuards is None else NativeGuards
