"""Counts the memory of training from shapes, exact to the byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .. import masking
from .. import storage as stored
from ..kernels.codecs import CODECS
from ..kernels.rules import RULES
from ..kernels.spec import Plane, Rule
from ..precision import KeepFp32
from ..recipe import Sparsity
from .model import DTYPES
from .peers import Peer
from .plan_rules import RuleOf, find_rule, rules_of_class
from .storages import Memory, Storage

_MOST = 1 << 59
"""Values of a tensor: torch counts their bytes in 63 bits."""


def parameters_of(model: Any) -> dict[str, Tensor]:
    """Every parameter by name; shapes become tensors without memory."""
    if isinstance(model, nn.Module):
        params: dict[str, Tensor] = dict(model.named_parameters())
        for name, param in params.items():
            if isinstance(param, UninitializedParameter):
                raise ValueError(f"{name} has no shape yet; run the module on an input once")
            if stored.is_dtensor(param):
                raise TypeError(
                    f"{name} is a DTensor; plan the module before it is sharded, with gpus and shard"
                )
        return params
    if not isinstance(model, Mapping):
        raise TypeError(f"model must be an nn.Module or shapes by name, got {type(model).__name__}")
    return {name: _shaped(name, shape) for name, shape in model.items()}


def _shaped(name: str, shape: Any) -> Tensor:
    sizes = list(shape) if isinstance(shape, Sequence) else [shape]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
        raise ValueError(f"the shape of {name!r} must be a sequence of integers of 0 or more, got {shape!r}")
    if max(sizes, default=0) > _MOST or math.prod(sizes) > _MOST:
        raise ValueError(f"the shape of {name!r} has more than 2**59 values, {shape!r}; give a smaller one")
    return torch.empty(sizes, device="meta", requires_grad=True)


def _converted(params: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The parameters without memory, real ones in another dtype if one is given."""
    out: dict[str, Tensor] = {}
    for name, param in params.items():
        own = dtype if dtype and param.is_floating_point() else param.dtype
        out[name] = torch.empty(param.shape, dtype=own, device="meta", requires_grad=param.requires_grad)
        # The marks that keep_fp32 leaves on a parameter, and whatever else a predicate may look for.
        vars(out[name]).update(vars(param))
    return out


class Counter:
    """Counts a model's memory under one storage after another, asking the optimizer's own functions.

    Args:
        params: by name; tensors without memory will do.
        grad_dtype: of gradients; None for each parameter's own.
        keep_fp32: which states stay in fp32.
        sparsity: which weights have masks, and whether dense ones stand behind them.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        grad_dtype: str | None,
        keep_fp32: KeepFp32,
        sparsity: Sparsity | None,
    ) -> None:
        self.params, self.grad_dtype, self.keep_fp32 = params, grad_dtype, keep_fp32
        self.sparsity = sparsity
        self.converted: dict[torch.dtype | None, dict[str, Tensor]] = {}
        self.sizes: dict[tuple[Any, ...], int] = {}

    def count(self, rule: str, storage: Storage) -> Memory:
        """The bytes of the whole model under a rule or a class of this name."""
        group = {
            "param_codec": storage.param_codec,
            "state_codec": storage.state_codec,
            "keep_fp32": self.keep_fp32,
        }
        weights = master = gradients = states = 0
        params = self._in_dtype_of(storage)
        rule_of = self._rules(rule, params)
        for name, param in params.items():
            weights += param.nbytes
            if not param.requires_grad:
                continue
            gradients += self._gradient(name, param)
            own_rule = rule_of(name)
            codec, codecs = stored.codecs(name, name, param, group, own_rule)
            beside = {"param" + plane.suffix for plane in codec.planes[1:]}
            for key, plane in stored.planes_of(codec, own_rule, codecs).items():
                nbytes = self._plane(param, plane)
                beside |= {key} if key.partition(".")[0] == "dense" else set()
                master += nbytes * (key in beside)
                states += nbytes * (key not in beside)
            states += sum(4 * math.prod(per.shape(tuple(param.shape))) for _, per in own_rule.shared)
        return Memory(weights, master, gradients, states)

    def masked(self) -> list[Tensor]:
        """The parameters that have masks, whatever the rule."""
        trained = [(name, param) for name, param in self.params.items() if param.requires_grad]
        return [param for name, param in trained if self._masked(RULES["adam"], name, param).inner]

    def _rules(self, name: str, params: Mapping[str, Tensor]) -> RuleOf:
        rule = find_rule(name)
        if rule is not None:
            return lambda own_name: self._masked(rule, own_name, params[own_name])
        trained = [(own_name, param) for own_name, param in params.items() if param.requires_grad]
        return rules_of_class(name, trained, self.sparsity)

    def _masked(self, rule: Rule, name: str, param: Tensor) -> Rule:
        """A rule, with a parameter's mask if it has one."""
        if self.sparsity is None:
            return rule
        return masking.find(self.sparsity, rule, name, name, param, {})[0] or rule

    def _in_dtype_of(self, storage: Storage) -> dict[str, Tensor]:
        codec = None if storage.param_codec == "auto" else CODECS[storage.param_codec]
        dtype = None if codec is None else getattr(torch, codec.planes[0].dtype)
        if dtype not in self.converted:
            self.converted[dtype] = _converted(self.params, dtype)
            for name, param in self.converted[dtype].items():
                if param.requires_grad:
                    stored.check_parameter(name, param)
        return self.converted[dtype]

    def _gradient(self, name: str, param: Tensor) -> int:
        key = param.shape, param.dtype
        if key not in self.sizes:
            dtype = DTYPES[self.grad_dtype] if self.grad_dtype else param.dtype
            grad = torch.empty(param.shape, dtype=dtype, device="meta")
            stored.check_gradient(name, param, grad)
            self.sizes[key] = grad.nbytes
        return self.sizes[key]

    def _plane(self, param: Tensor, plane: Plane) -> int:
        key = param.shape, param.dtype, plane
        if key not in self.sizes:
            shape = stored.plane_shape(plane, param)
            self.sizes[key] = math.prod(shape) * stored._plane_dtype(param, plane).itemsize
        return self.sizes[key]


def count_peer(params: Mapping[str, Tensor], peer: Peer) -> Memory:
    """What another library's AdamW takes."""
    everything = sum(param.numel() for param in params.values())
    trained = [param.numel() for param in params.values() if param.requires_grad]
    return Memory(
        weights=everything * peer.weight_bytes,
        master=sum(trained) * peer.master_bytes,
        gradients=sum(trained) * peer.weight_bytes,
        states=2 * peer.state.stored(trained),
    )
