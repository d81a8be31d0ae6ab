"""Which backend runs a bucket: the only file that knows which ones exist."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .launch import Driver
from .layout import MAX_DIMS, Layout
from .spec import Codec, Rule

BACKENDS = ("auto", "reference", "native", "triton", "cuda")
ARITHMETICS = ("auto", "exact", "fast")

_MODULES = {
    "reference": ".reference.driver",
    "native": ".native.cpu",
    "triton": ".triton.driver",
    "cuda": ".native.cuda",
}
_MASKS = {"native": ".native.cpu", "triton": ".triton.masks"}
_PREFERENCE = {"cpu": ("native",), "cuda": ("triton", "cuda")}
_log = logging.getLogger("fused_optim")


def _module(backend: str) -> Any:
    return importlib.import_module(_MODULES[backend], __package__)


def _unavailable(backend: str, device_type: str) -> str | None:
    """Why a backend cannot run on a kind of device, and what to do about it."""
    if backend == "reference":
        return None
    if backend == "native":
        if device_type != "cpu":
            return f"backend 'native' runs on CPU tensors, not on {device_type}; use backend='auto'"
        return _module(backend).unavailable()
    if backend == "cuda":
        if device_type != "cuda":
            return f"backend 'cuda' runs on CUDA tensors, not on {device_type}; use backend='auto'"
        return _module(backend).unavailable()
    return _module(backend).unavailable(device_type)


def available() -> dict[str, str | None]:
    """Every backend, with None if it can run here on its own device, else what is missing."""
    own_device = {"reference": "cpu", "native": "cpu", "triton": "cuda", "cuda": "cuda"}
    missing = None if torch.cuda.is_available() else "no CUDA device that torch can see"
    return {
        name: _unavailable(name, device) or (missing if device == "cuda" else None)
        for name, device in own_device.items()
    }


@cache
def _driver(backend: str) -> Driver:
    module = _module(backend)
    return Driver(backend, module.step, module.square_sum, by_table=backend != "reference")


@cache
def _log_once(message: str) -> None:
    _log.warning(message)


def _unusable(backend: str, device_type: str, codecs: tuple[Codec, ...]) -> str | None:
    """Why a backend cannot update tensors that are stored like this."""
    reason = _unavailable(backend, device_type)
    if reason is not None:
        return reason
    missing = sorted({codec.name for codec in codecs if _module(backend).lacks(codec.name)})
    return f"it has no {' and no '.join(missing)}" if missing else None


@cache
def choose(device_type: str, codecs: tuple[Codec, ...], backend: str) -> Driver:
    """The driver for tensors on a kind of device: codecs of the parameter and its states.

    Raises:
        ValueError: ``backend`` names one that cannot run these tensors.
    """
    compute = codecs[0].compute
    if backend == "auto":
        if compute != "float64":
            for name in _PREFERENCE.get(device_type, ()):
                reason = _unusable(name, device_type, codecs)
                if reason is None:
                    return _driver(name)
                _log_once(f"{name} kernels are not used on {device_type}: {reason}")
        return _driver("reference")
    if compute == "float64" and backend != "reference":
        raise ValueError(
            f"backend={backend!r} computes in float32 and cannot update float64 parameters; "
            "use backend='auto' or 'reference' for them"
        )
    reason = _unusable(backend, device_type, codecs)
    if reason is not None:
        usable = [name for name in _MODULES if _unusable(name, device_type, codecs) is None]
        raise ValueError(f"backend={backend!r} cannot run here: {reason}. Backends usable here: {usable}")
    return _driver(backend)


def that_walks(layout: Layout, name: str, driver: Driver, backend: str) -> Driver:
    """A driver that finds the elements of a parameter and its gradient: the one chosen, or the reference.

    Raises:
        ValueError: ``backend`` names one that knows fewer dimensions.
    """
    dims = len(layout.sizes)
    if dims <= MAX_DIMS or not driver.by_table:
        return driver
    reason = (
        f"{name} and its gradient lie in memory in {dims} dimensions that cannot be merged, where kernels "
        f"know {MAX_DIMS}"
    )
    if backend != "auto":
        raise ValueError(
            f"{reason}: backend={backend!r} cannot update it; use backend='auto' or 'reference', or make "
            "both contiguous"
        )
    _log_once(f"{driver.name} kernels are not used: {reason}; make both contiguous")
    return _driver("reference")


def mask_functions(device_type: str) -> Any:
    """The module whose functions find masks of whole tensors on a kind of device; None if none can run."""
    for name in _PREFERENCE.get(device_type, ()):
        if name in _MASKS and _unavailable(name, device_type) is None:
            return importlib.import_module(_MASKS[name], __package__)
    return None


def choose_exact(device_type: str, arithmetic: str, rule: Rule, codecs: tuple[Codec, ...]) -> bool:
    """Whether a bucket computes without contraction and with IEEE division and square root.

    Raises:
        ValueError: ``arithmetic='fast'`` for tensors that are not on a GPU.
    """
    if device_type != "cuda":
        if arithmetic == "fast":
            raise ValueError(
                f"arithmetic='fast' exists on GPUs only and the parameters are on {device_type}; "
                "use arithmetic='auto' or 'exact'"
            )
        return True
    if arithmetic == "auto":
        budget: Callable[..., bool] = importlib.import_module(".triton.budget", __package__).auto_exact
        param, grad, *states = codecs
        return budget(rule, param, grad, tuple(states))
    return arithmetic == "exact"
