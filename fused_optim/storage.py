"""Which codec stores what, and the states of a parameter: created, checked, decoded, encoded."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .kernels.codecs import CODECS, OF_DTYPE, PARAM_CODECS, for_slot
from .kernels.layout import follows, memory_order, walked
from .kernels.masking import keeps_dense
from .kernels.spec import Codec, Plane, Rule
from .precision import keeps_full_precision, patterns_of

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def is_dtensor(tensor: Tensor) -> bool:
    """Without importing ``torch.distributed.tensor``, which takes longer than everything else here."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _is_awaited(tensor: Tensor) -> bool:
    """Whether it is what a collective of torch.distributed has promised."""
    module = sys.modules.get("torch.distributed._functional_collectives")
    return module is not None and isinstance(tensor, module.AsyncCollectiveTensor)


def local_view(tensor: Tensor) -> Tensor:
    """The real, local memory behind a tensor: a DTensor's shard, a complex number's two parts."""
    if is_dtensor(tensor):
        tensor = tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    if _is_awaited(tensor):
        tensor = tensor.wait()  # pyright: ignore[reportAttributeAccessIssue]
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.resolve_neg()


def codec_of(tensor: Tensor) -> Codec | None:
    """The codec that stores a tensor as it is, None for dtypes that no rule updates."""
    dtype = _REAL.get(tensor.dtype, tensor.dtype)
    name = OF_DTYPE.get(str(dtype).removeprefix("torch."))
    return None if name is None else CODECS[name]


def plain_codec(tensor: Tensor) -> Codec:
    """The codec of a tensor that has passed :func:`check_parameter`."""
    codec = codec_of(tensor)
    assert codec is not None
    return codec


def value_codec(tensor: Tensor) -> Codec:
    """The codec of its values in full precision: of states by default, and of what is decoded."""
    return CODECS[OF_DTYPE[plain_codec(tensor).compute]]


def has_memory(tensor: Tensor) -> bool:
    """Whether its elements lie where its address says: not those of wrappers and of zeros without memory."""
    if type(tensor) is not Tensor and is_traceable_wrapper_subclass(tensor):
        return False
    try:
        return not tensor.numel() or tensor.is_meta or bool(tensor.data_ptr())
    except RuntimeError:
        return False


def check_parameter(name: str, param: Tensor) -> None:
    """Refuses tensors that no kernel can update.

    Raises:
        TypeError: an integer or float8 dtype, a nested tensor or a layout that is not strided, an unknown
            tensor subclass.
        ValueError: a view that conjugates or negates its memory lazily, a parameter without a shape yet.
    """
    if is_lazy(param):
        raise ValueError(
            f"{name} belongs to a lazy module that has seen no input yet; run the model once, then make the "
            "optimizer"
        )
    if codec_of(param) is None:
        raise TypeError(
            f"{name} has dtype {param.dtype}; allowed: float32, bfloat16, float16, float64, complex64, "
            "complex128. Convert it or leave it out of the optimizer"
        )
    if param.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, which has no strides; only dense (strided) parameters can be "
            "updated: make one of each of its parts (.unbind()), or of .to_padded_tensor()"
        )
    if param.layout != torch.strided:
        raise TypeError(f"{name} has layout {param.layout}; only dense (strided) parameters can be updated")
    if not is_dtensor(param) and not has_memory(param):
        raise TypeError(
            f"{name} is a {type(param).__name__}, whose memory this library does not know; "
            "pass plain tensors, nn.Parameter or DTensor"
        )
    if param.is_conj() or param.is_neg():
        raise ValueError(
            f"{name} is a lazily conjugated or negated view; "
            "make it a parameter of its own with .resolve_conj().resolve_neg()"
        )


def check_leaves(index: int, group: Any) -> None:
    """Torch's own check, with the parameter's place and the remedy in the message.

    Raises:
        ValueError: a parameter was computed from others.
    """
    params = group.get("params") if isinstance(group, dict) else None
    items: Any = params if isinstance(params, list | tuple) else ()
    for position, item in enumerate(items):
        name, param = item if isinstance(item, tuple) else (None, item)
        if isinstance(param, Tensor) and not (param.is_leaf or param.retains_grad):
            label = f" ({name!r})" if name else ""
            raise ValueError(
                f"can't optimize a non-leaf Tensor: parameter {position} of group {index}{label} was "
                "computed from other tensors; pass those, or p.detach().requires_grad_()"
            )


def check_gradient(name: str, param: Tensor, grad: Tensor) -> Codec:
    """The codec of a gradient that fits its parameter.

    Raises:
        ValueError: a sparse gradient, another shape, dtype, device or sharding than the parameter's.
    """
    if grad.layout != torch.strided:
        raise ValueError(
            f"the gradient of {name} is sparse ({grad.layout}); use sparse=False in the embedding, or "
            "torch.optim.SparseAdam for this parameter"
        )
    own, codec = plain_codec(param), codec_of(grad)
    fits = codec is not None and codec.compute == own.compute and grad.is_complex() == param.is_complex()
    if codec is None or not fits or grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"the gradient of {name} is {tuple(grad.shape)} {grad.dtype} on {grad.device} for a parameter of "
            f"{tuple(param.shape)} {param.dtype} on {param.device}; convert it before step()"
        )
    if not is_dtensor(grad) and not _is_awaited(grad) and not has_memory(grad):
        raise ValueError(
            f"the gradient of {name} is a {type(grad).__name__} without memory of its own; convert it to a "
            "plain tensor before step()"
        )
    if is_dtensor(param) != is_dtensor(grad) or (
        is_dtensor(param) and param.placements != grad.placements  # pyright: ignore[reportAttributeAccessIssue]
    ):
        raise ValueError(
            f"{name} and its gradient are not sharded in the same way; redistribute the gradient"
        )
    return codec


def param_codec(name: str, param: Tensor, group: Mapping[str, Any]) -> Codec:
    """The codec of a parameter.

    Raises:
        ValueError: ``param_codec`` does not fit the tensor's dtype.
    """
    own, wanted = plain_codec(param), group["param_codec"]
    fitting = [codec for codec in PARAM_CODECS if CODECS[codec].planes[0].dtype == own.planes[0].dtype]
    if param.is_complex():
        fitting = [own.name]
    if wanted != "auto" and wanted not in fitting:
        raise ValueError(
            f"param_codec={wanted!r} does not fit {name} of dtype {param.dtype}; "
            f"use 'auto' or one of {fitting}, or convert the parameter"
        )
    return own if wanted == "auto" else CODECS[wanted]


def codecs(
    name: str, own_name: str, param: Tensor, group: Mapping[str, Any], rule: Rule
) -> tuple[Codec, tuple[Codec, ...]]:
    """The codec of a parameter, and of each slot of its rule.

    ``param_codec`` is for the weights, which a masked rule may keep as a state; what the model then sees of
    them is stored as its dtype says.

    Raises:
        ValueError: an option does not fit the parameter.
    """
    weights = param_codec(name, param, group)
    kept = value_codec(param) if group["param_codec"] == "auto" else weights
    states = state_codecs(name, own_name, param, group, rule, kept)
    return plain_codec(param) if keeps_dense(rule) else weights, states


def state_codecs(
    name: str, own_name: str, param: Tensor, group: Mapping[str, Any], rule: Rule, weights: Codec
) -> tuple[Codec, ...]:
    """The codec of each slot of a rule.

    Args:
        name: of the parameter in messages.
        own_name: what the user calls it; may be empty.
        param: the parameter.
        group: its options.
        rule: what its group follows.
        weights: the codec of weights, for rules that keep them as a state.

    Raises:
        ValueError: a mapping names a state that the rule lacks, a pattern meets a parameter without a
            name, or a parameter is asked to keep its states in a precision that it cannot.
    """
    given: Any = group["state_codec"]
    wanted: dict[str, Any]
    names = [slot.name for slot in rule.slots if slot.codec is None]
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"state_codec names {unknown}, but the states of {rule.name} are {names}")
        wanted = {slot: given.get(slot, "auto") for slot in names}
    else:
        wanted = dict.fromkeys(names, given)
    default = value_codec(param)
    patterns = patterns_of(group["keep_fp32"])
    if patterns and not own_name:
        raise ValueError(
            f"keep_fp32 has the name patterns {patterns}, but {name} came without a name; "
            "give the optimizer model.named_parameters()"
        )
    full = keeps_full_precision(own_name, param, group["keep_fp32"])
    chosen: list[Codec] = []
    for slot in rule.slots:
        if slot.codec is not None:
            chosen.append(weights if slot.codec == "weights" else CODECS[slot.codec])
            continue
        codec = wanted[slot.name]
        if codec not in ("auto", default.name) and (param.is_complex() or "fp64" in (codec, default.name)):
            raise ValueError(
                f"state_codec={codec!r} for {slot.name} of {name} ({param.dtype}): "
                f"such parameters keep their states in {default.name}; use 'auto'"
            )
        exempt = codec == "auto" or (full and CODECS[codec].block > 1)
        chosen.append(default if exempt else for_slot(codec, slot.signed))
    return tuple(chosen)


def planes_of(param: Codec, rule: Rule, states: tuple[Codec, ...]) -> dict[str, Plane]:
    """Every plane beside the parameter itself that a kernel sees, under its key in the state."""
    owners = [("param", param.planes[1:])]
    owners += [(slot.name, codec.planes) for slot, codec in zip(rule.slots, states, strict=True)]
    return {owner + plane.suffix: plane for owner, planes in owners for plane in planes}


def _plane_dtype(param: Tensor, plane: Plane) -> torch.dtype:
    return param.dtype if param.is_complex() else getattr(torch, plane.dtype)


def plane_shape(plane: Plane, param: Tensor) -> tuple[int, ...]:
    """A parameter's shape, or, where values share an entry, a vector for what this rank holds of it."""
    return tuple(param.shape) if plane.per == 1 else (-(-local_view(param).numel() // plane.per),)


def empty_plane(param: Tensor, plane: Plane) -> Tensor:
    """Zeros: in the parameter's shape and memory order, or a vector where values share an entry."""
    dtype = _plane_dtype(param, plane)
    if plane.per > 1:
        return torch.zeros(plane_shape(plane, param), dtype=dtype, device=param.device)
    out = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    assert follows(local_view(out), local_view(param))
    return out


ORDER = "memory_order"
"""Key of the dimensions in the order in which they lay in memory when a parameter's states were made."""


def order_of(name: str, state: Mapping[str, Any], param: Tensor) -> list[int]:
    """The order in which a state's vectors run: the usual one if it tells nothing.

    Raises:
        ValueError: it is no order of the parameter's dimensions.
    """
    order = state.get(ORDER)
    if order is None:
        return list(range(param.ndim))
    dims = order.tolist() if isinstance(order, Tensor) else order
    if not isinstance(dims, list) or sorted(dims) != list(range(param.ndim)):
        raise ValueError(
            f"state {ORDER!r} of {name} is {dims!r}, an order of its {param.ndim} dimensions is expected: it "
            "belongs to another model or is damaged"
        )
    return dims


def is_order_of(dims: Sequence[int], param: Tensor) -> bool:
    """Whether a walk through a parameter's memory meets its dimensions in this order."""
    local = local_view(param)
    return [dim for dim in dims if local.shape[dim] != 1] == walked(local)


def _needs_order(param: Tensor, planes: Collection[Plane]) -> bool:
    """Whether states must tell the order of dimensions: vectors do not show it.

    With more than two dimensions they always do, because ``.to(memory_format=...)`` changes it, and a
    checkpoint that is read into states of another order must find the entry there.
    """
    unusual = param.ndim > 2 or not is_order_of(range(param.ndim), param)
    return unusual and any(plane.per > 1 for plane in planes)


def complete_state(
    state: dict[str, Any], param: Tensor, rule: Rule, param_codec: Codec, codecs: tuple[Codec, ...]
) -> None:
    """Adds the step count and the planes that a state lacks, as zeros; masks and weights are not its task."""
    # Momentum without a count comes from torch.optim.SGD, after its first step.
    started = any(isinstance(state.get(slot.name), Tensor) for slot in rule.slots)
    step = state.get("step", 1.0 if started else 0.0)
    if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.ndim:
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    own = [slot.name for slot in rule.slots if slot.codec is not None]
    planes = planes_of(param_codec, rule, codecs)
    for key, plane in planes.items():
        if state.get(key) is None and key.partition(".")[0] not in own:
            state[key] = empty_plane(param, plane)
    if state.get(ORDER) is None and _needs_order(param, planes.values()):
        state[ORDER] = torch.tensor(memory_order(local_view(param)), device="cpu")
    for key, per in rule.shared:
        if state.get(key) is None:
            state[key] = torch.zeros(per.shape(tuple(param.shape)), dtype=torch.float32, device=param.device)


def check_state(
    name: str,
    state: Mapping[str, Any],
    param: Tensor,
    rule: Rule,
    param_codec: Codec,
    codecs: tuple[Codec, ...],
) -> None:
    """Refuses states that somebody replaced by something that does not fit.

    Raises:
        ValueError: shape, dtype, device or memory order of a plane is not the expected one.
    """
    planes = planes_of(param_codec, rule, codecs)
    kept = {
        key: (_plane_dtype(param, plane), plane_shape(plane, param), plane.per)
        for key, plane in planes.items()
    }
    kept |= {key: (torch.float32, per.shape(tuple(param.shape)), 0) for key, per in rule.shared}
    vectors = any(plane.per > 1 and state.get(key) is not None for key, plane in planes.items())
    order = order_of(name, state, param)
    if vectors and not is_order_of(order, param):
        raise ValueError(
            f"the dimensions of {name} lie in memory as {memory_order(local_view(param))}, outermost first, "
            f"and lay as {order} when its states were made; bring these into the new order: "
            "optimizer.load_state_dict(optimizer.state_dict())"
        )
    for key, (expected, shape, per) in kept.items():
        value = state.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state {key!r} of {name} is {value!r}, where a tensor of shape {shape} belongs; "
                "write into the tensor that is there, or load a checkpoint with load_state_dict"
            )
        if value.dtype != expected or value.device != param.device or tuple(value.shape) != shape:
            raise ValueError(
                f"state {key!r} of {name} is {tuple(value.shape)} {value.dtype} on {value.device}; "
                f"expected {shape} {expected} on {param.device}. Move states with the parameters, and "
                "load checkpoints with load_state_dict"
            )
        in_order = value.is_contiguous() if per != 1 else follows(local_view(value), local_view(param))
        if not in_order:
            raise ValueError(
                f"state {key!r} of {name} has strides {value.stride()}, which do not follow the "
                f"parameter's {param.stride()}; load it with load_state_dict"
            )
