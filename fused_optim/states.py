"""A parameter's state between its planes in memory and plain values: for checkpoints and for reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.codecs import CODECS
from .kernels.layout import flat
from .kernels.masking import DENSE, MASK
from .kernels.planes import read, write
from .kernels.reference.blocks import BLOCK_CODECS
from .kernels.rules import RULES
from .kernels.spec import Codec, Plane, Rule
from .storage import (
    ORDER,
    complete_state,
    empty_plane,
    is_order_of,
    local_view,
    order_of,
    plane_shape,
    planes_of,
    value_codec,
)


class Stored(NamedTuple):
    """How a parameter and each of its states are kept."""

    param: Codec
    states: tuple[Codec, ...]


def decode(param: Tensor, state: Mapping[str, Any], key: str, codec: Codec) -> Tensor:
    """The values of a state as a tensor like the parameter, in fp32 (fp64, complex: in its own precision).

    Args:
        param: whose state it is.
        state: its planes, and in which order they run if that is not the parameter's.
        key: the state's name, such as ``"exp_avg"``.
        codec: how it is stored.
    """
    order = local_view(param)
    if _shares_entries(codec):
        order = _memory(order, order_of("a parameter", state, param))
    planes = [local_view(state[key + plane.suffix]) for plane in codec.planes]
    out = empty_plane(param, value_codec(param).planes[0])
    read(codec, planes, order, local_view(out))
    return out


def encode(param: Tensor, value: Tensor, key: str, codec: Codec) -> dict[str, Tensor]:
    """A state's planes for values of any float dtype and strides; nothing is aliased."""
    dense = empty_plane(param, value_codec(param).planes[0]).copy_(value)
    return encode_local(param, local_view(dense), key, codec)


def encode_local(param: Tensor, values: Tensor, key: str, codec: Codec) -> dict[str, Tensor]:
    """The same for the values of what this rank holds of a parameter."""
    state = {key + plane.suffix: empty_plane(param, plane) for plane in codec.planes}
    planes = [local_view(plane) for plane in state.values()]
    write(codec, planes, values, local_view(param))
    if codec.lookup == "dynamic_signed":
        _restore(codec, planes, flat(values, local_view(param)).flatten(), local_view(param))
    return state


def _restore(codec: Codec, planes: Sequence[Tensor], values: Tensor, order: Tensor) -> None:
    """Corrects blocks that were decoded before and whose largest magnitude is negative.

    The signed map has no -1: with the largest magnitude as their scale they would shrink by 0.7 % each time
    they are decoded and encoded. Where another scale gives every value of a block exactly, it is that one.
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % codec.block)).view(-1, codec.block)
    lowest = blocks.amin(1)
    (rows,) = torch.where((lowest < 0) & (-lowest > blocks.amax(1)) & lowest.isfinite())
    if not len(rows):
        return
    blocks = blocks[rows]
    block_codec = BLOCK_CODECS[codec.name]
    quotient = lowest[rows] / block_codec.value(torch.zeros(1, dtype=torch.int32, device=values.device))
    codes, scales = (flat(plane, order).flatten() for plane in planes)
    wide = torch.nn.functional.pad(codes, (0, -len(codes) % codec.block)).view(-1, codec.block)
    # Several scales may have rounded to the same lowest value.
    for scale in (quotient.nextafter(quotient * 2), quotient.nextafter(quotient * 0), quotient):
        near = block_codec.code(blocks / scale.unsqueeze(1))
        exact = (block_codec.value(near) * scale.unsqueeze(1) == blocks).all(1)
        wide[rows[exact]] = near[exact].to(wide.dtype)
        scales[rows[exact]] = scale[exact]
    for plane, new in zip(planes, (wide.flatten()[: len(codes)], scales), strict=True):
        target = flat(plane, order)
        target.copy_(new.view(target.shape))


def _is_stored_as(entry: Mapping[str, Any], key: str, codec: Codec, param: Tensor) -> bool:
    planes = [(entry.get(key + plane.suffix), getattr(torch, plane.dtype)) for plane in codec.planes]
    return all(
        isinstance(value, Tensor) and (value.is_complex() if param.is_complex() else value.dtype == dtype)
        for value, dtype in planes
    )


def _check_shape(name: str, key: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(
            f"state {key!r} of {name} has shape {tuple(value.shape)} in the state dict, "
            f"expected {shape}: it belongs to another model or is damaged"
        )


def _copy(
    name: str,
    entry: Mapping[str, Any],
    param: Tensor,
    key: str,
    planes: Sequence[Plane],
    signed_scale: bool = False,
) -> dict[str, Tensor]:
    """Planes as they were saved.

    Raises:
        ValueError: a plane that is missing, damaged or of another size.
    """
    state: dict[str, Tensor] = {}
    for plane in planes:
        value, shape = entry[key + plane.suffix], plane_shape(plane, param)
        _check_shape(name, key + plane.suffix, value, shape)
        if plane.suffix == ".scale" and not value.isfinite().all():
            raise ValueError(
                f"state {key + plane.suffix!r} of {name} is NaN or infinite in the state dict: training had "
                "diverged when it was saved, or it is damaged; load an earlier one"
            )
        if plane.suffix == ".scale" and not signed_scale and (value < 0).any():
            raise ValueError(
                f"state {key + plane.suffix!r} of {name} holds {float(value.min()):g} in the state dict, "
                "where no scale is below 0: it is damaged"
            )
        state[key + plane.suffix] = empty_plane(param, plane).copy_(value)
    return state


def _checked_value(name: str, entry: Mapping[str, Any], param: Tensor, key: str) -> Tensor:
    value = entry[key]
    if not isinstance(value, Tensor) or value.shape != param.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"state {key!r} of {name} has shape {shape} in the state dict, the parameter has "
            f"{tuple(param.shape)}: it belongs to another model"
        )
    if value.is_complex() != param.is_complex():
        raise ValueError(
            f"state {key!r} of {name} is {value.dtype} in the state dict, the parameter is {param.dtype}: it "
            "belongs to another model"
        )
    if not (value.is_floating_point() or value.is_complex()):
        raise ValueError(
            f"state {key!r} of {name} is {value.dtype} in the state dict: codes of another library, or of "
            "this one without its own entry 'fused_optim'; save with state_dict(portable=True)"
        )
    return value


def _checked_step(name: str, step: Any) -> Any:
    """A copy of a step count; ``complete_state`` makes a tensor of a number.

    Raises:
        ValueError: it is no number, or missing.
    """
    number = isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)
    if not number or not 0 <= float(step) < float("inf"):
        raise ValueError(
            f"the step count of {name} is {step!r} in the state dict, a number from 0 on is expected: "
            "it is damaged"
        )
    return step.detach().float().reshape(()).clone() if isinstance(step, Tensor) else step


_SHARED = ("radius", "row_second_moment")
_SLOTS = {slot.name for rule in RULES.values() for slot in rule.slots}
_KNOWN = {"param", "step", ORDER, MASK.name, DENSE.name, *_SHARED, *_SLOTS}
"""What this library writes, by the name before the first dot; states of matrices belong to modules above."""


def _is_of_the_user(key: str) -> bool:
    """Whether no rule and no codec of this library writes an entry of this name."""
    return key.partition(".")[0] not in _KNOWN


def orphans(state: Mapping[str, Any], rule: Rule, stored: Stored) -> list[str]:
    """Entries of this library that an optimizer no longer keeps, its options being others now."""
    kept = {"step", ORDER, *planes_of(stored.param, rule, stored.states), *(key for key, _ in rule.shared)}
    return [key for key in state if key not in kept and not _is_of_the_user(key)]


def _owned(value: Any, param: Tensor) -> Any:
    """A copy of an entry that only the user reads, on the parameter's device."""
    return value.detach().to(param.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)


def _memory(param: Tensor, dims: Sequence[int]) -> Tensor:
    """A tensor without memory whose dimensions lie in the given order, outermost first."""
    like = torch.empty([param.shape[dim] for dim in dims], device="meta")
    return like.permute([dims.index(dim) for dim in range(param.ndim)])


def _shares_entries(codec: Codec) -> bool:
    """Whether planes are vectors in memory order, not tensors in the parameter's shape."""
    return any(plane.per > 1 for plane in codec.planes)


def _sources(entry: Mapping[str, Any], param: Tensor, rule: Rule, saved: Stored | None) -> list[Codec | None]:
    """How each slot was saved: as planes of a codec (``keep_fp32`` may have overruled it), or as values."""
    if saved is None:
        return [None] * len(rule.slots)
    plain = value_codec(param)
    pairs = zip(rule.slots, saved.states, strict=True)
    # Of a parameter that had another precision, states have that.
    plains = (plain, CODECS["fp32"], CODECS["fp64"])
    return [
        next((c for c in (codec, *plains) if _is_stored_as(entry, slot.name, c, param)), None)
        for slot, codec in pairs
    ]


def load(
    name: str,
    entry: Mapping[str, Any],
    param: Tensor,
    rule: Rule,
    now: Stored,
    saved: Stored | None,
    ours: bool = False,
) -> dict[str, Any]:
    """A parameter's state from a checkpoint; nothing is aliased.

    Args:
        name: of the parameter in messages.
        entry: what was saved for it.
        param: the parameter.
        rule: what it follows.
        now: its codecs in this optimizer.
        saved: its codecs if this library saved planes; None for plain values.
        ours: whether this library saved it: then entries that no rule knows are the user's, and stay.

    Raises:
        ValueError: another optimizer's keys, another model's shapes, damaged planes, no step count.
    """
    # Masks and dense weights come with the first step of an optimizer that finds none.
    present = [slot.codec is None or slot.name in entry for slot in rule.slots]
    rule = replace(rule, slots=tuple(compress(rule.slots, present)))
    now = now._replace(states=tuple(compress(now.states, present)))
    saved = saved and saved._replace(states=tuple(compress(saved.states, present)))
    sources = _sources(entry, param, rule, saved)
    param_planes = () if saved is None else saved.param.planes[1:]
    param_keys = {"param" + plane.suffix for plane in param_planes}
    expected = {slot.name for slot in rule.slots}
    for slot, source in zip(rule.slots, sources, strict=True):
        expected |= {slot.name + plane.suffix for plane in source.planes} if source else set()
    shared = {key: per.shape(tuple(param.shape)) for key, per in rule.shared if entry.get(key) is not None}
    found = {key for key, value in entry.items() if value is not None} - {"step", ORDER, *shared}
    extra = {key for key in found - param_keys - expected if ours and _is_of_the_user(key)}
    if found - param_keys - extra != expected:
        raise ValueError(
            f"the state dict holds {sorted(found)} for {name}, but {rule.name} keeps {sorted(expected)}: "
            "it belongs to another optimizer or to other options, or it is damaged"
        )
    if param_keys and saved is not None and saved.param != now.param:
        raise ValueError(
            f"the state dict keeps the weights of {name} as {saved.param.name!r}, the optimizer as "
            f"{now.param.name!r}; construct it with the same param_codec, or save with "
            "state_dict(portable=True), which leaves the bits beyond the parameter's own dtype out"
        )
    order = order_of(name, entry, param)
    stays = saved is None or is_order_of(order, param)
    state: dict[str, Any] = {key: _owned(entry[key], param) for key in extra}
    # Without second moments, which it corrects, others keep no count.
    if entry.get("step") is not None or saved is not None or not all(slot.signed for slot in rule.slots):
        state["step"] = _checked_step(name, entry.get("step"))
    if param_keys and found >= param_keys:
        state |= _copy(name, entry, param, "param", now.param.planes[1:])
    for key, shape in shared.items():
        if not isinstance(entry[key], Tensor):
            raise ValueError(
                f"state {key!r} of {name} is {entry[key]!r} in the state dict, a tensor of shape {shape} is "
                "expected: it is damaged"
            )
        _check_shape(name, key, entry[key], shape)
        state[key] = entry[key].detach().to(param.device, torch.float32, copy=True)
    for slot, source, codec in zip(rule.slots, sources, now.states, strict=True):
        if saved is not None and source is None:
            raise ValueError(
                f"the state dict does not hold {slot.name!r} of {name} as its own options say (names and "
                "dtypes of codes and scales): it is damaged"
            )
        if source is codec and (stays or not _shares_entries(codec)):
            state |= _copy(name, entry, param, slot.name, codec.planes, codec.signed_scale)
            continue
        if source is None or not (_shares_entries(source) or len(source.planes) > 1):
            value = _checked_value(name, entry, param, slot.name)
        else:
            planes = _copy(name, entry, param, slot.name, source.planes, source.signed_scale)
            value = decode(param, {**planes, ORDER: entry.get(ORDER)}, slot.name, source)
        state |= encode(param, value, slot.name, codec)
    complete_state(state, param, rule, now.param, now.states)
    return state
