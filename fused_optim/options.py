"""What every optimizer here accepts beyond torch's arguments, and the checks of all arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from .hypersphere import Hypersphere
from .kernels.codecs import PARAM_CODECS, STATE_CODECS
from .kernels.dispatch import ARITHMETICS, BACKENDS
from .newton_schulz import check_newton_schulz
from .precision import SMALL, KeepFp32, check_keep_fp32
from .recipe import Sparsity
from .recipes import CAST
from .spectral_clip import SpectralClip


class Options(TypedDict, total=False):
    """Keyword options of every class, valid for the whole optimizer or per parameter group.

    Attributes:
        state_codec: storage of the states: ``"auto"`` (fp32; fp64 for float64 parameters), a codec's
            name, or a mapping from state names to codecs, such as ``{"exp_avg": "int8"}``. ``"fp16"`` has
            too small a range for second moments: with beta2=0.999 those of gradients below 5e-3 are 0 in it.
        param_codec: storage of the parameters: ``"auto"`` (as the tensor's dtype says), or a codec whose
            first plane is the tensor itself, such as ``"bf16_split8"`` for bfloat16 parameters.
        keep_fp32: whose states stay in fp32 although ``state_codec`` has 8 or 4 bits: parameters with
            fewer elements than a number, whose names match a pattern (name them:
            ``AdamW(model.named_parameters())``), several of these, or a function of name and parameter.
        seed: of the random bits of codecs that round stochastically; from 0 to 2**32 - 1. Replicas that
            must stay equal need the same seed.
        spectral: what happens to whole matrices in a step: a :class:`fused_optim.spectral.SpectralClip`
            bounds the singular values of updates and gradients, a
            :class:`fused_optim.spectral.Hypersphere` keeps the norms of parameters.
        sparsity: which weights are pruned while the model learns: a recipe of :mod:`fused_optim.sparsity`,
            such as ``SRSTE(n=2, m=4)``.
        clip_grad_norm: largest L2 norm of the gradients of all parameters of this optimizer, after
            loss scaling is undone; ``None`` for no clipping. ``p.grad`` itself is not changed. Of DTensors
            all ranks' shards count: each mesh reduces one number, and every rank must step.
        skip_nonfinite: leave every parameter, state and step count untouched in a step in which any
            gradient is NaN or infinite; ``optimizer.skipped_steps`` counts such steps.
        backend: ``"auto"``, ``"native"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
        arithmetic: ``"exact"`` (equal bits on every backend), ``"fast"`` (GPU: fused multiply-add,
            approximate division and square root, decay rounded for itself) or ``"auto"``.
    """

    state_codec: str | Mapping[str, str]
    param_codec: str
    keep_fp32: KeepFp32
    seed: int
    spectral: SpectralClip | Hypersphere | None
    sparsity: Sparsity | None
    clip_grad_norm: float | None
    skip_nonfinite: bool
    backend: str
    arithmetic: str


OPTION_DEFAULTS: Options = {
    "state_codec": "auto",
    "param_codec": "auto",
    "keep_fp32": SMALL,
    "seed": 0,
    "spectral": None,
    "sparsity": None,
    "clip_grad_norm": None,
    "skip_nonfinite": False,
    "backend": "auto",
    "arithmetic": "auto",
}

ENGINE_OPTIONS = (
    *("state_codec", "param_codec", "keep_fp32", "spectral", "sparsity"),
    *("backend", "arithmetic"),
)
"""Options that say how this process stores and computes, which a checkpoint does not override."""

_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum", "l1")


def _in_range(name: str, value: Any, low: float = -sys.float_info.max) -> None:
    """A finite number from ``low`` on."""
    if not low <= value < float("inf"):
        label = {"lr": "learning rate", "eps": "epsilon value"}.get(name, f"{name} value")
        allowed = f"finite and at least {low:g}" if low == 0 else "finite"
        raise ValueError(f"Invalid {label}: {value}; it must be {allowed}")


def _one_number(name: str, value: Any) -> None:
    # Numpy's numbers are Real as well.
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"{name} must be a number or a one-element tensor, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
        raise TypeError(f"{name} must be a real number, got a tensor of dtype {value.dtype}")


def _betas(group: Mapping[str, Any]) -> None:
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers in [0, 1), got {betas!r}")
    for index, beta in enumerate(betas):
        _one_number(f"betas[{index}]", beta)
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")


def _torch_flags(group: Mapping[str, Any]) -> None:
    """Flags of torch, with its own complaints where a combination is an error there too."""
    flags = ("maximize", "capturable", "differentiable", "amsgrad", "nesterov", "decoupled_weight_decay")
    for name in (*flags, "corrects_second_moment"):
        if name in group and not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")
    for name in ("foreach", "fused"):
        if group.get(name) not in (None, True, False):
            raise TypeError(
                f"{name} must be True, False or None (it has no effect here), got {group[name]!r}"
            )
    if group.get("fused") and group.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together; neither has an effect here")
    if group.get("differentiable"):
        if group.get("fused"):
            raise RuntimeError("`fused` does not support `differentiable`")
        raise ValueError(
            "differentiable=True is not supported: the step runs in one kernel that autograd cannot see "
            "through; use torch.optim for differentiable steps"
        )
    if group.get("foreach") and not group["capturable"]:
        tensors = {
            "lr": group["lr"],
            **{f"betas[{i}]": beta for i, beta in enumerate(group.get("betas", ()))},
        }
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")


def check_codecs(group: Mapping[str, Any]) -> None:
    """Checks what one parameter group says of storage.

    Raises:
        ValueError: an unknown codec.
    """
    for name, known in (("state_codec", STATE_CODECS), ("param_codec", PARAM_CODECS)):
        given = group[name]
        names = given.values() if name == "state_codec" and isinstance(given, Mapping) else (given,)
        for codec in names:
            if codec != "auto" and codec not in known:
                raise ValueError(f"{name}={codec!r} is unknown; allowed: auto, {', '.join(known)}")


def _options(group: Mapping[str, Any]) -> None:
    for name, allowed in (("backend", BACKENDS), ("arithmetic", ARITHMETICS)):
        if group[name] not in allowed:
            raise ValueError(f"{name}={group[name]!r} is unknown; allowed: {', '.join(allowed)}")
    if group["clip_grad_norm"] is not None:
        _one_number("clip_grad_norm", group["clip_grad_norm"])
        if isinstance(group["clip_grad_norm"], Tensor):
            raise TypeError("clip_grad_norm must be a float or None, not a tensor")
        _in_range("clip_grad_norm", group["clip_grad_norm"], 0.0)
    if not isinstance(group["skip_nonfinite"], bool):
        raise TypeError(f"skip_nonfinite must be True or False, got {group['skip_nonfinite']!r}")
    check_codecs(group)
    check_keep_fp32(group["keep_fp32"])
    if not isinstance(group["spectral"], SpectralClip | Hypersphere | None):
        raise TypeError(
            "spectral must be a SpectralClip or a Hypersphere of fused_optim.spectral, or None; "
            f"got {group['spectral']!r}"
        )
    if not isinstance(group["sparsity"], Sparsity | None):
        raise TypeError(
            "sparsity must be a recipe of fused_optim.sparsity, such as SRSTE(n=2, m=4), or None; "
            f"got {group['sparsity']!r}"
        )
    adams = "l1" in group
    if isinstance(group["sparsity"], CAST) != adams:
        raise ValueError(
            f"sparsity={group['sparsity']!r}: CASTAdamS needs CAST(total_steps=...), no other class takes it"
        )
    if adams and group["spectral"] is not None:
        raise ValueError("CASTAdamS has no spectral option: its masks and its update cannot be told apart")
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={seed} is out of range; allowed: 0 to 2**32 - 1")


def _kinds(group: Mapping[str, Any]) -> None:
    """Names and types; of numbers that schedules set, not their range."""
    for name in (*_NOT_NEGATIVE, "dampening"):
        if name in group:
            _one_number(name, group[name])
    if "betas" in group:
        _betas(group)
    if "ns_steps" in group:
        check_newton_schulz(group)
    _torch_flags(group)
    _options(group)


def check_group(group: Mapping[str, Any]) -> None:
    """Checks the options of one parameter group.

    Raises:
        ValueError: a value out of range or an unknown name.
        TypeError: a value of the wrong type.
    """
    _kinds(group)
    for name in _NOT_NEGATIVE:
        if name in group:
            _in_range(name, group[name], 0.0)
    if "dampening" in group:
        _in_range("dampening", group["dampening"])
    for index, beta in enumerate(group.get("betas", ())):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}; it must be in [0, 1)")
    if "dampening" in group and group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def check_changed(groups: Iterable[Mapping[str, Any]]) -> None:
    """Checks options that may have been set after construction, in ``param_groups``.

    Numbers that schedules set may leave their range, as in torch: no tensor is read for it.

    Raises:
        ValueError: an unknown name.
        TypeError: a value of the wrong type.
    """
    for group in groups:
        _kinds(group)
