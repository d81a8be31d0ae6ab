"""Adapters: how other libraries' optimizers, and ours, are made from the same hyperparameters."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fused_optim
from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.rules import RULES

LR = 1e-2
_SHARED = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "amsgrad")
_SWITCHES: tuple[dict[str, Any], ...] = ({}, {"amsgrad": True}, {"momentum": 0.9})


class MissingPeerError(Exception):
    """A peer that cannot run here, and why."""


def imported(package: str, module: str, name: str) -> Any:
    """What a package has under a name, with dots where modules hold it.

    Raises:
        MissingPeerError: it is not installed.
    """
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except ImportError as error:
        raise MissingPeerError(f"{package} is not installed ({error})") from None


@dataclass(frozen=True)
class Peer:
    """Another library's classes by the catalogue's rule names; options stay with the adapter.

    ``names`` translates hyperparameters that the library calls otherwise, ``group`` holds the keys by which
    its parameter groups choose an algorithm, ``device`` is the only kind that it runs on.
    """

    package: str
    module: str
    classes: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    state_bits: int = 32
    slow: bool = False
    compiled: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    group: Mapping[str, Any] = field(default_factory=dict)
    device: str = ""

    def make(self, rule: str, params: Sequence[Tensor], hyper: Mapping[str, Any]) -> Optimizer:
        """The library's optimizer.

        Raises:
            MissingPeerError: it is not here, or does not run here.
        """
        elsewhere = {param.device.type for param in params} - {self.device}
        if self.device and elsewhere:
            raise MissingPeerError(f"{self.package} runs on {self.device}, not on {', '.join(elsewhere)}")
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            cls = imported(self.package, self.module, self.classes[rule])
            accepted = inspect.signature(cls).parameters
            named = {self.names.get(name, name): value for name, value in hyper.items()}
            shared = {name: value for name, value in named.items() if name in accepted}
            grouped = [{"params": list(params), **self.group}] if self.group else params
            try:
                optimizer = cls(grouped, **{**shared, **self.options})
            except (ImportError, RuntimeError) as error:
                # What it builds at first use, or a part of it that is a package of its own.
                reason = str(error.__cause__ or error).partition("\n")[0][:200]
                raise MissingPeerError(f"{self.package} does not run here ({reason})") from None
        if self.compiled:
            optimizer.step = torch.compile(optimizer.step)
        return optimizer

    def class_name(self, rule: str) -> str:
        """The class without the modules that hold it, and the algorithm that its groups choose."""
        return " ".join([self.classes[rule].rpartition(".")[2], *map(str, self.group.values())])


_TORCH = {"adam": "AdamW", "adam_amsgrad": "AdamW", "sgd": "SGD", "sgd_momentum": "SGD"}
_BITSANDBYTES = {"adam": "AdamW", "lion": "Lion"}
_8BIT = {"adam": "AdamW8bit", "lion": "Lion8bit"}
_DEEPSPEED = {"adam": "adam.DeepSpeedCPUAdam", "lion": "lion.DeepSpeedCPULion"}
_MUONIUM = {"weight_decay": "wd", "betas": "adam_betas", "eps": "adam_eps"}

PEERS: dict[str, Peer] = {
    "torch-fused": Peer("torch", "torch.optim", _TORCH, {"fused": True}),
    "torch-foreach": Peer("torch", "torch.optim", _TORCH, {"foreach": True}),
    "torch-compiled": Peer("torch", "torch.optim", _TORCH, slow=True, compiled=True),
    "optimi": Peer("torch-optimi", "optimi", {"adam": "AdamW", "lion": "Lion"}),
    "lion-pytorch": Peer("lion-pytorch", "lion_pytorch", {"lion": "Lion"}),
    "pytorch-optimizer": Peer("pytorch-optimizer", "pytorch_optimizer", {"lion": "Lion"}),
    "heavyball": Peer("heavyball", "heavyball", {"adam": "AdamW"}, {"consume_grad": False}, slow=True),
    "flashoptim": Peer("flashoptim", "flashoptim", {"adam": "FlashAdamW", "lion": "FlashLion"}, state_bits=8),
    "bitsandbytes": Peer("bitsandbytes", "bitsandbytes.optim", _BITSANDBYTES),
    "bitsandbytes-8bit": Peer("bitsandbytes", "bitsandbytes.optim", _8BIT, state_bits=8),
    "deepspeed-cpu": Peer("deepspeed", "deepspeed.ops", _DEEPSPEED, slow=True, device="cpu"),
    "muonium": Peer(
        "muonium",
        "muonium",
        {"adam": "Muon"},
        {"fused_adam": True},
        names=_MUONIUM,
        group={"algorithm": "adamw"},
    ),
    "torchao-8bit": Peer("torchao", "torchao.optim", {"adam": "AdamW8bit"}, state_bits=8, slow=True),
}


@dataclass(frozen=True)
class Recipe:
    """How one of our classes is made to follow a rule of the catalogue."""

    cls: type[Optimizer]
    switch: Mapping[str, Any]


@cache
def recipes() -> dict[str, Recipe]:
    """A recipe for every rule, found by asking each public class which rule it follows."""
    found: dict[str, Recipe] = {}
    for name in sorted(fused_optim.__all__):
        cls = getattr(fused_optim, name)
        if not (inspect.isclass(cls) and issubclass(cls, fused_optim.FusedOptimizer)):
            continue
        # AdamW8bit and its like are the same classes with other defaults; others are timed elsewhere.
        elsewhere = (fused_optim.Muon, fused_optim.CASTAdamS)
        if inspect.isabstract(cls) or cls._preset or issubclass(cls, elsewhere):
            continue
        accepted = inspect.signature(cls).parameters
        for switch in _SWITCHES:
            if set(switch) <= set(accepted):
                optimizer = cls([Parameter()], **switch)
                found[optimizer._rule(optimizer.param_groups[0]).name] = Recipe(cls, switch)
    assert set(found) == set(RULES), set(RULES) ^ set(found)
    return found


@dataclass(frozen=True)
class Contender:
    """One optimizer of a case: ours or a peer's, and how it stores parameters and states."""

    source: str
    rule: str = "adam"
    param: str = "fp32"
    states: str = "fp32"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.source == "fused_optim"

    @property
    def label(self) -> str:
        """Unique within a case; the rule's class name, how parameters and (ours) states are stored."""
        ours = recipes()[self.rule].cls.__name__
        name = ours if self.is_ours else PEERS[self.source].class_name(self.rule)
        storage = f"{self.param}/{self.states}" if self.is_ours and RULES[self.rule].slots else self.param
        options = "".join(f" {value}" for _, value in self.options)
        return f"{self.source} {name}{_variant(self.rule, name)} {storage}{options}"

    def hyper(self) -> dict[str, Any]:
        """The hyperparameters that every contender with this rule shares."""
        recipe = recipes()[self.rule]
        defaults = recipe.cls([Parameter()], **recipe.switch, lr=LR).defaults
        shared = {name: defaults[name] for name in _SHARED if name in defaults}
        return {**shared, **({"weight_decay": 0.1} if "weight_decay" in shared else {})}

    def make(self, params: Sequence[Tensor]) -> Optimizer:
        """The optimizer.

        Raises:
            MissingPeerError: the library, or the backend asked for, is not here.
        """
        if not self.is_ours:
            return PEERS[self.source].make(self.rule, params, self.hyper())
        cls = recipes()[self.rule].cls
        options = dict(self.options)
        try:
            return cls(params, **self.hyper(), param_codec=self.param, state_codec=self.states, **options)
        except ValueError as error:
            if "backend" in options:
                raise MissingPeerError(str(error)) from None
            raise

    @property
    def allowed_error(self) -> float:
        """Largest relative error of three steps' change that still counts as correct."""
        names = {self.param, self.states} if self.is_ours else {self.param}
        narrowest = min(plane.bits // plane.per for name in names for plane in CODECS[name].planes[:1])
        if not self.is_ours:
            narrowest = min(narrowest, PEERS[self.source].state_bits)
        return {32: 1e-4, 16: 0.1}.get(narrowest, 0.3)


def _variant(rule: str, name: str) -> str:
    """What a rule's name adds to its class's: ``adam_amsgrad`` is AdamW with amsgrad."""
    _, _, variant = rule.partition("_")
    return f" {variant}" if variant and variant not in name.lower() else ""
