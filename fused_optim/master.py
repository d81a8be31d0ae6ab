"""Parameters and states in full precision, whatever codec stores them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import states
from .kernels.launch import Key
from .kernels.masking import keeps_dense
from .kernels.spec import Codec
from .masking import show
from .optimizer import FusedOptimizer
from .storage import complete_state, plain_codec


def _find(optimizer: Any, param: Tensor) -> tuple[int, Key]:
    """The group of one of an optimizer's parameters, its rule and its codecs."""
    if not isinstance(optimizer, FusedOptimizer):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise TypeError(
            f"the optimizer is a {kind}, not one of fused_optim: give the one that it wraps, if it does "
            "(optimizer.optimizer); others keep no bits beside param and optimizer.state[param]"
        )
    place = next(((g, i) for g, i, p in optimizer._parameters() if p is param), None)
    if place is None:
        raise ValueError("the tensor is not a parameter of this optimizer; pass the parameter itself")
    return place[0], optimizer._key(*place, param)


def _codec(optimizer: FusedOptimizer, param: Tensor, name: str) -> Codec:
    _, key = _find(optimizer, param)
    codecs = {"param": key.param}
    codecs |= {slot.name: codec for slot, codec in zip(key.rule.slots, key.states, strict=True)}
    if name not in codecs:
        raise ValueError(f"{name!r} is not kept by {type(optimizer).__name__}; allowed: {', '.join(codecs)}")
    return codecs[name]


@torch.no_grad()
def full_precision(optimizer: FusedOptimizer, param: Tensor, name: str = "param") -> Tensor:
    """A copy of a parameter's values, or of one of its states', as the rule sees them.

    Args:
        optimizer: which updates the parameter.
        param: one of its parameters.
        name: ``"param"`` for the weights with every bit of their codec, or a state such as ``"exp_avg"``.

    Returns:
        A tensor like the parameter in fp32 (float64 and complex parameters: in their own dtype).

    Raises:
        ValueError: a tensor or a name that the optimizer does not know, or a state before the first step.
        TypeError: an optimizer of another library.

    Example:
        >>> import torch, fused_optim
        >>> weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        >>> optimizer = fused_optim.SGD([weight], lr=1e-4, param_codec="bf16_split16")
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> weight[0].item(), round(fused_optim.full_precision(optimizer, weight)[0].item(), 6)
        (1.0, 0.9999)
    """
    codec = _codec(optimizer, param, name)
    planes = {**optimizer.state.get(param, {}), "param": param}
    if name == "param" and any("param" + plane.suffix not in planes for plane in codec.planes):
        return states.decode(param, planes, name, plain_codec(param))
    if name not in planes:
        raise ValueError(f"the parameter has no {name!r} yet; it comes with the first step")
    return states.decode(param, planes, name, codec)


@torch.no_grad()
def set_full_precision(optimizer: FusedOptimizer, param: Tensor, values: Tensor) -> None:
    """Writes weights with every bit that the parameter's codec keeps.

    Assigning to the parameter itself leaves the bits below its dtype as they were: use this after
    loading fp32 weights, averaging or clamping them. Of a masked parameter these are all weights, also
    those that the model does not see; its mask stays.

    Args:
        optimizer: which updates the parameter.
        param: one of its parameters; changed in place.
        values: of its shape, in any float dtype.

    Raises:
        ValueError: a tensor that the optimizer does not know, or values of another shape.
        TypeError: an optimizer of another library.

    Example:
        >>> import torch, fused_optim
        >>> weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        >>> optimizer = fused_optim.SGD([weight], param_codec="bf16_split16")
        >>> fused_optim.set_full_precision(optimizer, weight, torch.full((4,), 0.1))
        >>> round(fused_optim.full_precision(optimizer, weight)[0].item(), 6)
        0.1
    """
    group, key = _find(optimizer, param)
    if values.shape != param.shape:
        raise ValueError(f"values of shape {tuple(values.shape)} for a parameter of {tuple(param.shape)}")
    planes = states.encode(param, values, "param", key.param)
    param.copy_(planes.pop("param"))
    if keeps_dense(key.rule):
        planes |= states.encode(param, values, "dense", _codec(optimizer, param, "dense"))
    if planes:
        state = optimizer.state[param]
        complete_state(state, param, key.rule, key.param, key.states)
        for name, plane in planes.items():
            state.setdefault(name, plane).copy_(plane)
    if "mask" in optimizer.state.get(param, {}) and key.rule.inner is not None:
        show(optimizer, group, param, key)
