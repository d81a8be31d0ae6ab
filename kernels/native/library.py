"""Finds and opens the compiled libraries, which csrc/ builds with C functions only."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

ABI = 6
"""Equals ``ABI`` in csrc/table.h."""

WORK = ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int
"""Types of what ``Library.work`` returns."""

_REBUILD = "run `pip install -e .` in the checkout, or there `pip install --force-reinstall --no-deps .`"
_NEEDS = {"cpu": "g++ and CMake", "cuda": "nvcc (CUDA 12.8 or later) on the PATH"}


def path(kind: str) -> Path | None:
    """Where ``libfused_optim_<kind>.so`` is; None if it was not built."""
    package = sys.modules[(__package__ or "").partition(".")[0]]
    candidates = (Path(root, "lib", f"libfused_optim_{kind}.so") for root in package.__path__)
    return next((candidate for candidate in candidates if candidate.exists()), None)


class Library:
    """One opened library: its functions, and the ids it gives to names."""

    def __init__(self, kind: str, handle: ctypes.CDLL) -> None:
        self._prefix, self._handle = f"fused_optim_{kind}_", handle
        self.rules = self._ids("rules")
        self.codecs = self._ids("codecs")

    def function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        """A C function with its types declared."""
        function = self._handle[self._prefix + name]
        function.restype, function.argtypes = result, arguments
        return function

    def address(self, name: str) -> int:
        """Where a C function is."""
        address = ctypes.cast(self._handle[self._prefix + name], ctypes.c_void_p).value
        assert address is not None
        return address

    def _ids(self, name: str) -> dict[str, int]:
        names = self.function(name, ctypes.POINTER(ctypes.c_char_p))()

        def until_null() -> Iterator[str]:
            i = 0
            while (entry := names[i]) is not None:
                yield entry.decode()
                i += 1

        return {entry: i for i, entry in enumerate(until_null())}

    def work(self, bucket: Any) -> tuple[Any, ...]:
        """What the bucket computes as the C functions take it: the ids of its rule and its codecs."""
        ids = [self.codecs[codec.name] for codec in (bucket.param, bucket.grad, *bucket.states)]
        rule = bucket.rule.inner or bucket.rule
        return self.rules[rule.name], bucket.rule.group, (ctypes.c_int32 * len(ids))(*ids), len(ids)


def layouts_of(bucket: Any) -> int | None:
    """The address of the bucket's layouts, if its tensors are strided."""
    return bucket.layouts.data_ptr() if bucket.layouts is not None else None


@cache
def load(kind: str) -> Library | str:
    """The library for "cpu" or "cuda", or what is missing and how to get it."""
    file = path(kind)
    if file is None:
        return f"libfused_optim_{kind}.so was not built; install {_NEEDS[kind]}, then {_REBUILD}"
    # A library linked to OpenMP uses the runtime that is in the process already: torch's, so import it first.
    assert torch.__version__
    try:
        handle = ctypes.CDLL(str(file))
        abi = handle[f"fused_optim_{kind}_abi"]()
    except (OSError, AttributeError) as error:
        return f"{file} cannot be loaded ({error}); {_REBUILD}"
    if abi != ABI:
        return f"{file} was built from other sources (interface {abi}, needed {ABI}); {_REBUILD}"
    return Library(kind, handle)
