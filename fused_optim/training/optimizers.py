"""The optimizers of ``pretrain``, each beside torch's class of the same name, and the schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fused_optim

from ..kernels.codecs import CODECS, OF_DTYPE
from ..spectral import SpectralClip
from .model import decay_groups
from .sparse import build_recipe, lr_factor, retraining_step, separate
from .storages import Storage


@dataclass(frozen=True)
class Pair:
    """Our class, what torch has to compare it with, and what suits the rule.

    ``lr_factor`` multiplies the preset's lr for AdamW; ``options`` are for our class only.
    """

    ours: Callable[..., torch.optim.Optimizer]
    theirs: Callable[..., torch.optim.Optimizer] | None
    moments: str
    default_moments: Any
    lr_factor: float
    weight_decay: float
    options: Mapping[str, Any] = field(default_factory=dict)


_MUON = {"others": "adamw", "adjust_lr_fn": "match_rms_adamw", "ns_coefficients": "polar_express"}
OPTIMIZERS = {
    "adamw": Pair(fused_optim.AdamW, torch.optim.AdamW, "betas", [0.9, 0.95], 1.0, 0.1),
    "adam": Pair(fused_optim.Adam, torch.optim.Adam, "betas", [0.9, 0.95], 1.0, 0.0),
    "lion": Pair(fused_optim.Lion, None, "betas", [0.9, 0.98], 0.2, 0.5),
    "sgd": Pair(fused_optim.SGD, torch.optim.SGD, "momentum", 0.9, 100.0, 0.0),
    "muon": Pair(fused_optim.Muon, torch.optim.AdamW, "momentum", 0.95, 2.0, 0.1, _MUON),
}
"""Lion's sign makes its updates larger than Adam's: a fifth of the lr, five times the decay. Muon stands
beside AdamW and bears twice its lr with ``match_rms_adamw``."""


def class_of(config: Any, step: int) -> Callable[..., torch.optim.Optimizer]:
    """Our class from a step on: that of the optimizer, or the one that a recipe brings."""
    retrains = config.sparsity == "cast" and step >= retraining_step(config)
    return fused_optim.CASTAdamS if retrains else OPTIMIZERS[config.optimizer].ours


def label(contender: str, config: Any) -> str:
    """How a contender is called in tables and figures."""
    pair = OPTIMIZERS[config.optimizer]
    ours = class_of(config, config.steps)
    name = getattr(pair.theirs if contender == "torch" else ours, "__name__", config.optimizer)
    if contender != "torch" and config.spectral_clip is not None:
        name = f"{name} clip={config.spectral_clip:g}"
    if contender != "torch" and config.sparsity is not None:
        name = f"{name} {config.sparsity} {config.pattern}"
    return f"{contender} {name} {config.torch_dtype if contender == 'torch' else config.storage}"


def param_dtype(contender: str, config: Any) -> str:
    """The dtype of the model that a contender trains, under its codec's name."""
    codec = config.torch_dtype if contender == "torch" else Storage.parse(config.storage).param_codec
    return "fp32" if codec == "auto" else OF_DTYPE[CODECS[codec].planes[0].dtype]


def build_optimizer(contender: str, model: nn.Module, config: Any, step: int = 0) -> torch.optim.Optimizer:
    """The optimizer of one side of the comparison from a step on, over the model's two parameter groups.

    Raises:
        ValueError: options that the optimizer refuses.
    """
    pair = OPTIMIZERS[config.optimizer]
    groups = decay_groups(model, config.weight_decay)
    moments = {"betas": tuple(config.betas)} if config.betas else {"momentum": config.momentum}
    storage, options = Storage.parse(config.storage), dict(pair.options)
    lr, their_lr = config.lr, config.lr / lr_factor(config)
    if "others" in options:
        # Muon stands beside AdamW, and AdamW has what is not Muon's.
        options["others_lr"], their_lr = their_lr, their_lr / pair.lr_factor
    if contender == "torch":
        assert pair.theirs is not None
        theirs = {"betas": tuple(OPTIMIZERS["adamw"].default_moments)} if "others" in options else moments
        return pair.theirs(groups, lr=their_lr, fused=True, **theirs)
    if config.spectral_clip is not None:
        options["spectral"] = SpectralClip(post=config.spectral_clip)
    recipe = build_recipe(config)
    if step < retraining_step(config):
        recipe, lr = None, their_lr
    if recipe is not None:
        options["sparsity"] = recipe
    if recipe is not None and config.sparsity == "cast":
        options["l1"] = config.pruned_decay
        groups = separate(groups, recipe, others_lr=their_lr)
    return class_of(config, step)(
        groups,
        lr=lr,
        param_codec=storage.param_codec,
        state_codec=storage.state_codec,
        clip_grad_norm=config.clip_grad_norm,
        backend=config.backend,
        seed=config.seed,
        **moments,
        **options,
    )


def wsd(step: int, steps: int, warmup: int, decay: int) -> float:
    """Warmup–stable–decay: the factor on the learning rate in step ``step``, counted from 0.

    Linear from ``1 / (warmup + 1)`` to 1, then 1, then linear to ``1 / (decay + 1)`` in the last step.
    """
    return min(1.0, (step + 1) / (warmup + 1), max(0, steps - step) / (decay + 1))


def build_schedule(
    optimizer: torch.optim.Optimizer, config: Any, first: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule as torch runs it, of an optimizer that begins with the step ``first``."""
    warmup, decay = config.warmup_steps, config.decay_steps

    def factor(step: int) -> float:
        return wsd(first + step, config.steps, warmup, decay)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
