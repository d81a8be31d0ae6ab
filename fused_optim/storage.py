"""Which codec stores what, and the states of a parameter: created, checked, decoded, encoded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .kernels.codecs import CODECS, OF_DTYPE
from .kernels.layout import follows
from .kernels.spec import Codec, Rule

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def is_dtensor(tensor: Tensor) -> bool:
    """Without importing ``torch.distributed.tensor``, which takes longer than everything else here."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_view(tensor: Tensor) -> Tensor:
    """The real, local memory behind a tensor: a DTensor's shard, a complex number's two parts."""
    if is_dtensor(tensor):
        tensor = tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.resolve_neg()


def codec_of(tensor: Tensor) -> Codec | None:
    """The codec that stores a tensor as it is, None for dtypes that no rule updates."""
    dtype = _REAL.get(tensor.dtype, tensor.dtype)
    name = OF_DTYPE.get(str(dtype).removeprefix("torch."))
    return None if name is None else CODECS[name]


def check_parameter(name: str, param: Tensor) -> None:
    """Refuses tensors that no kernel can update.

    Raises:
        TypeError: an integer or float8 dtype, a tensor without memory, an unknown tensor subclass.
        ValueError: a view that conjugates or negates its memory lazily.
    """
    if codec_of(param) is None:
        raise TypeError(
            f"{name} has dtype {param.dtype}; allowed: float32, bfloat16, float16, float64, complex64, "
            "complex128. Convert it or leave it out of the optimizer"
        )
    if param.layout != torch.strided:
        raise TypeError(f"{name} has layout {param.layout}; only dense (strided) parameters can be updated")
    if is_traceable_wrapper_subclass(param) and not is_dtensor(param):
        raise TypeError(
            f"{name} is a {type(param).__name__}, whose memory this library does not know; "
            "pass plain tensors, nn.Parameter or DTensor"
        )
    if param.is_conj() or param.is_neg():
        raise ValueError(
            f"{name} is a lazily conjugated or negated view; "
            "make it a parameter of its own with .resolve_conj().resolve_neg()"
        )


def check_gradient(name: str, param: Tensor, grad: Tensor, needs_norm: bool) -> Codec:
    """The codec of a gradient that fits its parameter.

    Raises:
        ValueError: a sparse gradient, another shape, dtype, device or sharding than the parameter's,
            or a norm asked of sharded gradients.
    """
    if grad.layout != torch.strided:
        raise ValueError(
            f"the gradient of {name} is sparse ({grad.layout}); use sparse=False in the embedding, or "
            "torch.optim.SparseAdam for this parameter"
        )
    own, codec = codec_of(param), codec_of(grad)
    assert own is not None
    fits = codec is not None and codec.compute == own.compute and grad.is_complex() == param.is_complex()
    if codec is None or not fits or grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"the gradient of {name} is {tuple(grad.shape)} {grad.dtype} on {grad.device} for a parameter of "
            f"{tuple(param.shape)} {param.dtype} on {param.device}; convert it before step()"
        )
    if is_dtensor(param) != is_dtensor(grad) or (
        is_dtensor(param) and param.placements != grad.placements  # pyright: ignore[reportAttributeAccessIssue]
    ):
        raise ValueError(
            f"{name} and its gradient are not sharded in the same way; redistribute the gradient"
        )
    if needs_norm and is_dtensor(param):
        raise ValueError(
            f"{name} is a DTensor: clip_grad_norm and skip_nonfinite would see this rank's gradients only; "
            "use torch.nn.utils.clip_grad_norm_, which reduces over all ranks"
        )
    return codec


def param_codec(name: str, param: Tensor, group: Mapping[str, Any]) -> Codec:
    """The codec of a parameter.

    Raises:
        ValueError: ``param_codec`` does not fit the tensor's dtype.
    """
    own = codec_of(param)
    assert own is not None
    if group["param_codec"] not in ("auto", own.name):
        raise ValueError(
            f"param_codec={group['param_codec']!r} does not fit {name} of dtype {param.dtype}; "
            f"use 'auto' or {own.name!r}, or convert the parameter"
        )
    return own


def state_codecs(name: str, param: Tensor, group: Mapping[str, Any], rule: Rule) -> tuple[Codec, ...]:
    """The codec of each slot of a rule.

    Raises:
        ValueError: a mapping names a state that the rule lacks, or a complex or float64 parameter
            is asked to keep its states in another precision.
    """
    given = group["state_codec"]
    names = [slot.name for slot in rule.slots]
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"state_codec names {unknown}, but the states of {rule.name} are {names}")
        wanted = [given.get(slot, "auto") for slot in names]
    else:
        wanted = [given] * len(names)
    own = codec_of(param)
    assert own is not None
    default = "fp64" if own.name == "fp64" else "fp32"
    chosen = tuple(CODECS[default if codec == "auto" else codec] for codec in wanted)
    for slot, codec in zip(names, chosen, strict=True):
        if codec.name != default and (param.is_complex() or "fp64" in (codec.name, default)):
            raise ValueError(
                f"state_codec={codec.name!r} for {slot} of {name} ({param.dtype}): "
                f"such parameters keep their states in {default}; use 'auto'"
            )
    return chosen


def _state_dtype(param: Tensor, dtype: str) -> torch.dtype:
    return param.dtype if param.is_complex() else getattr(torch, dtype)


def _like(param: Tensor, dtype: str, value: Tensor | None = None) -> Tensor:
    """Zeros, or a copy of ``value``, dense and in the parameter's memory order."""
    out = torch.zeros_like(param, dtype=_state_dtype(param, dtype), memory_format=torch.preserve_format)
    assert follows(local_view(out), local_view(param))
    return out if value is None else out.copy_(value)


def complete_state(state: dict[str, Any], param: Tensor, rule: Rule, codecs: tuple[Codec, ...]) -> None:
    """Adds the step count and the planes that a state lacks, as zeros."""
    # Momentum without a count comes from torch.optim.SGD, after its first step.
    started = any(isinstance(state.get(slot.name), Tensor) for slot in rule.slots)
    step = state.get("step", 1.0 if started else 0.0)
    if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.ndim:
        state["step"] = torch.tensor(float(step), dtype=torch.float32)
    for slot, codec in zip(rule.slots, codecs, strict=True):
        for plane in codec.planes:
            if state.get(slot.name + plane.suffix) is None:
                state[slot.name + plane.suffix] = _like(param, plane.dtype)


def check_state(
    name: str, state: Mapping[str, Any], param: Tensor, rule: Rule, codecs: tuple[Codec, ...]
) -> None:
    """Refuses states that somebody replaced by something that does not fit.

    Raises:
        ValueError: shape, dtype, device or memory order of a plane is not the expected one.
    """
    for slot, codec in zip(rule.slots, codecs, strict=True):
        for plane in codec.planes:
            value = state.get(slot.name + plane.suffix)
            if value is None:
                continue
            expected = _state_dtype(param, plane.dtype)
            if value.dtype != expected or value.device != param.device or value.shape != param.shape:
                raise ValueError(
                    f"state {slot.name + plane.suffix!r} of {name} is {tuple(value.shape)} {value.dtype} on "
                    f"{value.device}; expected {tuple(param.shape)} {expected} on {param.device}. Move "
                    "states with the parameters, and load checkpoints with load_state_dict"
                )
            if not follows(local_view(value), local_view(param)):
                raise ValueError(
                    f"state {slot.name + plane.suffix!r} of {name} has strides {value.stride()}, which do "
                    f"not follow the parameter's {param.stride()}; load it with load_state_dict"
                )


def encode_state(
    name: str, saved: Mapping[str, Any], param: Tensor, rule: Rule, codecs: tuple[Codec, ...]
) -> dict[str, Any]:
    """A parameter's state from a checkpoint's values of any float dtype; nothing is aliased.

    Raises:
        ValueError: another optimizer's keys, or another model's shapes.
    """
    expected = {slot.name for slot in rule.slots}
    found = {key for key, value in saved.items() if value is not None and key != "step"}
    if found != expected:
        raise ValueError(
            f"the state dict holds {sorted(found)} for {name}, but {rule.name} keeps {sorted(expected)}: "
            "it belongs to another optimizer or to other options"
        )
    state: dict[str, Any] = {}
    if saved.get("step") is not None:
        state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).detach().reshape(()).clone()
    for slot, codec in zip(rule.slots, codecs, strict=True):
        value = saved[slot.name]
        if not isinstance(value, Tensor) or value.shape != param.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"state {slot.name!r} of {name} has shape {shape} in the state dict, the parameter has "
                f"{tuple(param.shape)}: it belongs to another model"
            )
        for plane in codec.planes:
            state[slot.name + plane.suffix] = _like(param, plane.dtype, value)
    complete_state(state, param, rule, codecs)
    return state
