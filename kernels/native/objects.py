"""What parameters, their gradients and their states are, asked in C.

The C functions get those of Python, and that which describes a tensor in DLPack's exchange interface.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int, c_int64, c_void_p, py_object
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from . import library

_GRAD, SHARD = "grad", "_local_tensor"


class _Exchange(ctypes.Structure):
    """DLPack's table of functions (major version 1)."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        *((name, c_void_p) for name in ("previous", "allocate", "to_managed", "to_object", "describe")),
    )


def _describe() -> int | None:
    """Address of torch's function that describes a tensor; None where torch has none."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = c_void_p, (py_object, ctypes.c_char_p)
    exchange = _Exchange.from_address(pointer(capsule, b"dlpack_exchange_api"))
    return exchange.describe if exchange.major == 1 else None


class _Objects:
    """The opened library's functions, and those that they call (``Functions`` in csrc/objects.cpp)."""

    def __init__(self, opened: library.Library) -> None:
        api = ctypes.pythonapi
        lists, objects = (api.PyList_GetItem, api.PyList_SetItem), (api.PyObject_GetAttr, api.Py_DecRef)
        python = *lists, *objects, api.PyDict_Next
        addresses = [ctypes.cast(function, c_void_p).value for function in python]
        self.describes_tensors = _describe() is not None
        self.functions = (c_void_p * 8)(*addresses, _describe(), id(_GRAD), id(None))

        def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
            # Keeps the interpreter's lock, and raises the exception that C leaves.
            return ctypes.PYFUNCTYPE(result, c_void_p, *arguments)(opened.address(name))

        tensors = py_object, c_int64, c_void_p, c_void_p, c_int64, py_object, c_void_p
        self.read_tensors = function("read_tensors", c_int64, *tensors)
        self.same_objects = function("same_objects", c_int, py_object, py_object, c_int64)
        self.same_entries = function("same_entries", c_int, py_object, c_int64, c_void_p)


@cache
def objects() -> _Objects | None:
    """The functions; None without the library."""
    opened = library.load("cpu")
    return None if isinstance(opened, str) else _Objects(opened)


class Entries:
    """The objects in dictionaries: keys, values and their order.

    They are known by their addresses: who makes this keeps them, so that no other objects take these.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]], functions: _Objects) -> None:
        self._dicts, self._functions = list(dicts), functions
        entries = (chain.from_iterable(d.items()) for d in dicts)
        addresses = list(chain.from_iterable((*map(id, each), None) for each in entries))
        self._addresses = (c_void_p * len(addresses))(*addresses)

    def same(self) -> bool:
        """Whether they are what they were."""
        functions, dicts = self._functions, self._dicts
        return functions.same_entries(functions.functions, dicts, len(dicts), self._addresses) == 1


class Parameters:
    """Parameters as they were in the step that was planned, and their gradients.

    ``sharded`` parameters are DTensors, and their shards are meant: the attribute to which FSDP2 itself
    writes them.
    """

    def __init__(self, params: Sequence[Tensor], sharded: bool, functions: _Objects) -> None:
        self._params, self._sharded, self._functions = list(params), sharded, functions
        self._words = np.zeros(sum(3 + 2 * p.ndim for p in params), np.int64)
        self._grad_addresses = np.zeros(len(params), np.int64)
        places = self._words.ctypes.data, len(self._words)
        self._places = id(SHARD) if sharded else None, *places, self._grad_addresses.ctypes.data
        self._expected = b""

    @classmethod
    def of(cls, params: Sequence[Tensor], sharded: bool) -> Parameters | None:
        """Parameters that all have gradients; None if they cannot be read in C."""
        functions = objects()
        if functions is None or not functions.describes_tensors:
            return None
        read = cls(params, sharded, functions)
        if not read._read([None] * len(params)) or not read._agrees():
            return None
        read._expected = read._words.tobytes()
        return read

    def _agrees(self) -> bool:
        """Whether the interface says the same of memory, sizes and strides as torch."""

        def meant(tensor: Any) -> Tensor:
            return getattr(tensor, SHARD) if self._sharded else tensor

        def expected() -> Iterator[int]:
            for param in map(meant, self._params):
                yield param.data_ptr()
                yield from chain.from_iterable(zip(param.shape, param.stride(), strict=True))

        places = [word for word in self._split() for word in (word[0], *word[3:])]
        grads = [meant(p.grad).data_ptr() for p in self._params]
        return places == list(expected()) and self._grad_addresses.tolist() == grads

    def _split(self) -> Iterator[list[int]]:
        words = iter(self._words.tolist())
        return ([next(words) for _ in range(3 + 2 * param.ndim)] for param in self._params)

    def _read(self, grads: list[Any]) -> bool:
        functions, (inner, words, capacity, addresses) = self._functions, self._places
        arguments = self._params, len(self._params), inner, words, capacity, grads, addresses
        try:
            return functions.read_tensors(functions.functions, *arguments) == capacity
        except (AttributeError, RuntimeError, TypeError, BufferError):
            return False

    def gradients(self) -> tuple[list[Tensor], np.ndarray] | None:
        """The gradients and their addresses; None if one is missing or a parameter is not what it was.

        The next call writes the array anew.
        """
        grads: list[Any] = [None] * len(self._params)
        if self._read(grads) and self._words.tobytes() == self._expected:
            return grads, self._grad_addresses
        return None
