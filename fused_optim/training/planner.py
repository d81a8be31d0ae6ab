"""Where the memory of training goes, counted from shapes alone and exact to the byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .. import storage as stored
from ..kernels.codecs import CODECS, PARAM_CODECS, STATE_CODECS
from ..kernels.rules import RULES
from ..kernels.spec import Plane, Rule
from ..precision import SMALL, KeepFp32, check_keep_fp32
from .model import DTYPES
from .peers import PEERS, Peer

Shapes: TypeAlias = "Mapping[str, Sequence[int]]"

SHARDS = ("none", "states", "all")
CARDS = (24, 48, 80, 141)
"""Memory of common GPUs in GB of 10**9 bytes."""

PARTS = ("weights", "master", "gradients", "states")

DEFAULT_RULES = ("adam", "lion")
DEFAULT_STORAGES = (
    "fp32",
    "split16",
    "bf16",
    "fp32+int8",
    "kahan+int8",
    "split16+int8",
    "split8+int8",
    "split8+int8_companded",
    "split8+int4",
    "bf16+int8",
    "sr+int4",
)

_RULE_OF_CLASS = {"adamw": "adam", "adamw_amsgrad": "adam_amsgrad"}
_SHORT = {name.removeprefix("bf16_"): name for name in PARAM_CODECS if name.startswith("bf16_")}


@dataclass(frozen=True)
class Storage:
    """How parameters and states are kept: the options ``param_codec`` and ``state_codec`` of an optimizer.

    Attributes:
        name: in tables.
        param_codec: the parameters are converted to its dtype first; ``"auto"`` leaves them as they are.
        state_codec: one codec, or one for each state by name.
    """

    name: str
    param_codec: str = "auto"
    state_codec: str | Mapping[str, str] = "auto"

    def __post_init__(self) -> None:
        """Checks the names.

        Raises:
            ValueError: a codec that does not exist.
        """
        states = self.state_codec.values() if isinstance(self.state_codec, Mapping) else (self.state_codec,)
        for kind, names, known in (
            ("parameters", (self.param_codec,), PARAM_CODECS),
            ("states", states, STATE_CODECS),
        ):
            for name in names:
                if name != "auto" and name not in known:
                    raise ValueError(
                        f"storage {self.name!r}: {kind} cannot be stored as {name!r}; allowed: auto, "
                        f"{', '.join(known)}"
                    )

    @classmethod
    def parse(cls, text: str) -> Storage:
        """The storage that ``PARAM`` or ``PARAM+STATES`` names.

        Args:
            text: a codec of the parameters (``split8``, ``kahan``, ``sr`` … are short for
                ``bf16_split8`` …) and, after a plus, one of the states (default: ``auto``, fp32).

        Raises:
            ValueError: a codec that does not exist.

        Example:
            >>> from fused_optim.training.planner import Storage
            >>> Storage.parse("split8+int8")
            Storage(name='split8+int8', param_codec='bf16_split8', state_codec='int8')
        """
        param, _, states = text.partition("+")
        return cls(text, _SHORT.get(param, param), _SHORT.get(states, states) or "auto")


@dataclass(frozen=True)
class Memory:
    """Bytes of training, without activations.

    Attributes:
        weights: the model's parameters.
        master: what the optimizer keeps beside them to make them more precise.
        gradients: one for each parameter that is trained.
        states: moments, with their scales.
    """

    weights: int
    master: int
    gradients: int
    states: int

    @property
    def total(self) -> int:
        """All four together."""
        return self.kept + self.gradients

    @property
    def kept(self) -> int:
        """What stays between two steps: weights, master and states."""
        return self.weights + self.master + self.states

    def on_each(self, gpus: int, shard: str) -> Memory:
        """The share of one GPU, rounded up.

        Args:
            gpus: how many share.
            shard: ``"none"`` copies everything, ``"states"`` splits states and master weights (ZeRO-1),
                ``"all"`` splits everything (FSDP).

        Example:
            >>> from fused_optim.training import Memory
            >>> Memory(weights=200, master=100, gradients=200, states=201).on_each(2, "states")
            Memory(weights=200, master=50, gradients=200, states=101)
        """
        shared = {"none": (), "states": ("master", "states"), "all": PARTS}[shard]
        return replace(self, **{part: -(-getattr(self, part) // gpus) for part in shared})


@dataclass(frozen=True)
class Entry:
    """One way to train the model.

    Attributes:
        rule: the rule, or None for another library.
        storage: the storage, or the other library's optimizer.
        memory: of the whole model.
        on_each: of one GPU.
    """

    rule: str | None
    storage: str
    memory: Memory
    on_each: Memory

    @property
    def fits(self) -> tuple[int, ...]:
        """The cards of ``CARDS`` that hold one GPU's share."""
        return tuple(card for card in CARDS if self.on_each.total <= card * 10**9)


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; ``str()`` gives the table.

    Attributes:
        model: what was planned for.
        parameters: values in the model's parameters.
        tensors: how many parameters those are.
        gpus: among how many GPUs.
        shard: what they share.
        entries: every rule with every storage, then other libraries.
        notes: what the numbers leave out.
    """

    model: str
    parameters: int
    tensors: int
    gpus: int
    shard: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        from .plan_report import table

        return table(self)


def plan(
    model: nn.Module | Shapes,
    *,
    rules: Sequence[str] = DEFAULT_RULES,
    storages: Sequence[str | Storage] = DEFAULT_STORAGES,
    grad_dtype: str | None = None,
    gpus: int = 1,
    shard: str = "none",
    keep_fp32: KeepFp32 = SMALL,
    peers: bool = True,
    name: str | None = None,
) -> Plan:
    """The memory that training a model takes, under every rule and storage.

    Nothing is allocated: a module on the ``meta`` device will do. State bytes are those of every
    tensor in ``optimizer.state`` after the first step, but for the step counts (4 bytes on the CPU for
    each parameter).

    Args:
        model: a module, whose parameters count as they are (frozen ones have neither gradients nor
            states), or the shapes of its parameters by name, then in fp32 under storage ``auto``.
        rules: names of rules (``python -m fused_optim list``).
        storages: as :meth:`Storage.parse` takes them, or ``Storage`` objects.
        grad_dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``; None for each parameter's own dtype.
        gpus: GPUs that train together.
        shard: what they share, see :meth:`Memory.on_each`.
        keep_fp32: which states stay in fp32, as in the optimizer.
        peers: whether other libraries' AdamW is listed, too.
        name: of the model in the table.

    Raises:
        ValueError: a name that does not exist, a storage that does not fit a parameter, no parameters.
        TypeError: a model that is neither a module nor shapes, or parameters that cannot be updated.

    Example:
        >>> from fused_optim.training import plan
        >>> found = plan({"weight": (4096, 4096)}, rules=["adam"], storages=["split8+int8"], peers=False)
        >>> found.entries[0].memory.kept / found.parameters
        5.03125
    """
    _check(rules, grad_dtype, gpus, shard, keep_fp32)
    wanted = [Storage.parse(item) if isinstance(item, str) else item for item in storages]
    if not rules or not wanted:
        raise ValueError("there is nothing to plan; give at least one rule and one storage")
    params = _parameters(model)
    numels = [param.numel() for param in params.values()]
    if not sum(numels):
        raise ValueError("the model has no parameters; pass one that has, or the shapes of its parameters")
    counter = _Counter(params, grad_dtype, keep_fp32)
    found = [(rule, item.name, counter.count(find_rule(rule), item)) for rule in rules for item in wanted]
    theirs = [(None, key, _count_peer(params, peer)) for key, peer in PEERS.items()] if peers else []
    entries = [
        Entry(rule, item, memory, memory.on_each(gpus, shard)) for rule, item, memory in [*found, *theirs]
    ]
    label = name or (type(model).__name__ if isinstance(model, nn.Module) else "shapes")
    notes = _notes(shard, wanted, peers)
    return Plan(label, sum(numels), len(numels), gpus, shard, tuple(entries), notes)


def find_rule(name: str) -> Rule:
    """The rule of this name, or of a class's name in lower case."""
    return RULES[_RULE_OF_CLASS.get(name, name)]


def _check(rules: Sequence[str], grad_dtype: str | None, gpus: int, shard: str, keep_fp32: Any) -> None:
    for given in rules:
        if given not in RULES and given not in _RULE_OF_CLASS:
            raise ValueError(f"rule {given!r} is unknown; allowed: {', '.join([*RULES, *_RULE_OF_CLASS])}")
    if grad_dtype is not None and grad_dtype not in DTYPES:
        raise ValueError(f"grad_dtype={grad_dtype!r} is unknown; allowed: None, {', '.join(DTYPES)}")
    if isinstance(gpus, bool) or not isinstance(gpus, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"gpus must be an integer, got {gpus!r}")
    if gpus < 1:
        raise ValueError(f"gpus={gpus}: at least one GPU is needed")
    if shard not in SHARDS:
        raise ValueError(f"shard={shard!r} is unknown; allowed: {', '.join(SHARDS)}")
    check_keep_fp32(keep_fp32)


def _parameters(model: Any) -> dict[str, Tensor]:
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


class _Counter:
    """Counts a model's memory under one storage after another, asking the optimizer's own functions."""

    def __init__(self, params: Mapping[str, Tensor], grad_dtype: str | None, keep_fp32: KeepFp32) -> None:
        self.params, self.grad_dtype, self.keep_fp32 = params, grad_dtype, keep_fp32
        self.converted: dict[torch.dtype | None, dict[str, Tensor]] = {}
        self.sizes: dict[tuple[Any, ...], int] = {}

    def count(self, rule: Rule, storage: Storage) -> Memory:
        """The bytes of the whole model."""
        group = {
            "param_codec": storage.param_codec,
            "state_codec": storage.state_codec,
            "keep_fp32": self.keep_fp32,
        }
        weights = master = gradients = states = 0
        for name, param in self._in_dtype_of(storage).items():
            weights += param.nbytes
            if not param.requires_grad:
                continue
            gradients += self._gradient(name, param)
            codec, codecs = stored.codecs(name, name, param, group, rule)
            beside = {"param" + plane.suffix for plane in codec.planes[1:]}
            for key, plane in stored.planes_of(codec, rule, codecs).items():
                nbytes = self._plane(param, plane)
                master += nbytes * (key in beside)
                states += nbytes * (key not in beside)
        return Memory(weights, master, gradients, states)

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
            stored.check_gradient(name, param, grad, needs_norm=False)
            self.sizes[key] = grad.nbytes
        return self.sizes[key]

    def _plane(self, param: Tensor, plane: Plane) -> int:
        key = param.shape, param.dtype, plane
        if key not in self.sizes:
            shape = stored.plane_shape(plane, param)
            self.sizes[key] = math.prod(shape) * stored._plane_dtype(param, plane).itemsize
        return self.sizes[key]


def _count_peer(params: Mapping[str, Tensor], peer: Peer) -> Memory:
    everything = sum(param.numel() for param in params.values())
    trained = [param.numel() for param in params.values() if param.requires_grad]
    return Memory(
        weights=everything * peer.weight_bytes,
        master=sum(trained) * peer.master_bytes,
        gradients=sum(trained) * peer.weight_bytes,
        states=2 * peer.state.stored(trained),
    )


def _notes(shard: str, storages: Sequence[Storage], peers: bool) -> tuple[str, ...]:
    notes = [
        "Activations, buffers of communication and what the allocator wastes are not included.",
        "GB and the cards' memory are 10^9 bytes.",
    ]
    if peers:
        notes.append("bitsandbytes and torchao update bf16 weights in place, without a master copy.")
    if any(storage.param_codec == "bf16" for storage in storages):
        notes.append(
            "Plain bf16 weights lose updates smaller than their last bit; sr, kahan and split keep them."
        )
    return tuple(notes)
