"""Checkpoints of bitsandbytes' block-wise 8-bit optimizers, in both directions.

``AdamW8bit``, ``Adam8bit``, ``Lion8bit`` and ``SGD8bit`` there keep codes of the same two maps, in the
same blocks of 256, as ``state_codec="int8"`` here; only the names differ, and moments pass bit for bit. Two
exceptions: of parameters that are not contiguous (channels-last, transposed) they are decoded and encoded
anew, because blocks run through memory here and bitsandbytes makes parameters contiguous; and what
bitsandbytes does not have stays behind, see :func:`to_bitsandbytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import states
from .checkpoint import FORMAT, OWN_KEY
from .kernels.codecs import CODECS, for_slot
from .kernels.lookup import dynamic_map
from .kernels.rules import RULES
from .kernels.spec import Slot
from .optimizer import FusedOptimizer

_WRAPPED = "__bnb_optimizer_quant_state__"
_GROUP_DEFAULTS: dict[str, Any] = {"eps": 1e-8, "alpha": 0.0, "t_alpha": None, "t_beta3": None}
_SHARED = ("lr", "betas", "eps", "weight_decay")
_KNOWN_THERE = tuple(RULES[name] for name in ("adam", "lion", "sgd_momentum"))


def from_bitsandbytes(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict for ``optimizer.load_state_dict`` from one of a bitsandbytes optimizer.

    Args:
        optimizer: of the same kind and with ``state_codec="int8"``; it is not changed.
        state_dict: of ``bitsandbytes.optim`` AdamW8bit, Adam8bit, Lion8bit or SGD8bit (0.44 or later).

    Returns:
        Learning rate, betas, eps and decay of the state dict's groups, and its codes and scales.

    Raises:
        ValueError: other groups than the optimizer's, another optimizer's states, parts that are missing,
            another map, blocks of another size, or an optimizer that bitsandbytes does not have.

    Example:
        >>> import fused_optim
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> theirs = {"step": 3, "state1": torch.ones(2), "state2": torch.ones(2)}
        >>> saved = {"state": {0: theirs}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        >>> optimizer = fused_optim.AdamW8bit([weight])
        >>> optimizer.load_state_dict(from_bitsandbytes(optimizer, saved))
        >>> optimizer.param_groups[0]["lr"], optimizer.state[weight]["step"].item()
        (0.1, 3.0)
    """
    _check_kind(optimizer)
    for part, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict.get(part), kind):
            raise ValueError(
                f"the bitsandbytes state dict has no {part!r}; give what optimizer.state_dict() gave there"
            )
    saved, live = state_dict["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in live]:
        raise ValueError(
            f"the bitsandbytes state dict has groups of {[len(g['params']) for g in saved]} parameters, the "
            f"optimizer of {[len(g['params']) for g in live]}; build it from the same parameters"
        )
    groups: list[dict[str, Any]] = []
    for number, (theirs, ours) in enumerate(zip(saved, live, strict=True)):
        taken = {key: theirs[key] for key in _SHARED if key in theirs and key in ours}
        if "momentum" in ours:
            # Their SGD keeps both numbers under this name.
            betas = theirs.get("betas", ())
            if len(betas) != 2:
                raise ValueError(
                    f"group {number} of the bitsandbytes state dict has betas {betas!r}; SGD8bit keeps "
                    "momentum and dampening there: it is of another optimizer, or damaged"
                )
            taken |= dict(zip(("momentum", "dampening"), betas, strict=True))
        kept = {key: value for key, value in ours.items() if key not in ("params", "keep_fp32")}
        groups.append({**kept, **taken, "params": theirs["params"], "state_codec": "int8"})
    ids = list(chain.from_iterable(group["params"] for group in saved))
    places = {index: place for index, place in zip(ids, optimizer._parameters(), strict=True)}
    state: dict[Any, Any] = {}
    for index, entry in state_dict["state"].items():
        if index not in places:
            raise ValueError(
                f"the bitsandbytes state dict has states of a parameter {index!r} that is in none of its "
                f"groups (there are {ids}): it is damaged"
            )
        group, position, _ = places[index]
        slots = optimizer._rule(live[group]).slots
        state[index] = _from_entry(optimizer._name(group, position), entry, slots)
    own = {"format": FORMAT, "skipped_steps": 0}
    return {"state": state, "param_groups": groups, OWN_KEY: own}


def _check_kind(optimizer: FusedOptimizer) -> None:
    """Refuses optimizers that bitsandbytes does not have.

    Raises:
        ValueError: a group follows another rule than those.
    """
    for number, group in enumerate(optimizer.param_groups):
        rule = optimizer._rule(group)
        if rule not in _KNOWN_THERE:
            states = ", ".join(slot.name for slot in rule.slots) or "none"
            raise ValueError(
                f"group {number} of {type(optimizer).__name__} (states: {states}) has no counterpart in "
                "bitsandbytes; AdamW and Adam without amsgrad, Lion, and SGD with momentum have: keep "
                "optimizer.state_dict() for the others"
            )


def _part(name: str, entry: Mapping[str, Any], key: str) -> Tensor:
    value = entry.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the bitsandbytes state dict has no {key} for {name}: it is of another optimizer, or damaged"
        )
    return value


def _from_entry(name: str, entry: Mapping[str, Any], slots: tuple[Slot, ...]) -> dict[str, Any]:
    flat = {**entry, **entry.get(_WRAPPED, {})}
    beyond = f"state{len(slots) + 1}"
    if flat.get(beyond) is not None:
        raise ValueError(
            f"the bitsandbytes state dict has a {beyond} for {name}, whose states are "
            f"{[slot.name for slot in slots]}: it is of another optimizer; load it into that one"
        )
    step = flat.get("step")
    step = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if not isinstance(step, int | float):
        raise ValueError(
            f"the bitsandbytes state dict has the step count {step!r} for {name}, a number is expected: "
            "it is damaged"
        )
    result: dict[str, Any] = {"step": torch.tensor(float(step), dtype=torch.float32, device="cpu")}
    for number, slot in enumerate(slots, 1):
        codes = _part(name, flat, f"state{number}")
        if not codes.is_contiguous():
            raise ValueError(
                f"state{number} of {name} has strides {codes.stride()}: bitsandbytes means its memory if a "
                "GPU wrote it, codes.as_strided([codes.numel()], [1]).view(codes.shape), and "
                "codes.contiguous() if a CPU did; put the right one in its place"
            )
        result[slot.name] = codes
        if codes.dtype != torch.uint8:
            continue
        expected = torch.from_numpy(dynamic_map(slot.signed))
        if not torch.equal(_part(name, flat, f"qmap{number}").cpu().float(), expected):
            raise ValueError(f"state{number} of {name} has another map than the dynamic one of 8 bits")
        scales = _part(name, flat, f"absmax{number}")
        block = CODECS["int8"].block
        if scales.shape != (-(-codes.numel() // block),):
            raise ValueError(
                f"state{number} of {name} has {scales.numel()} blocks for {codes.numel()} values; only "
                f"blocks of {block} fit (bitsandbytes 0.44 or later): load it there and save it anew"
            )
        result[slot.name + ".scale"] = scales
    return result


def to_bitsandbytes(optimizer: FusedOptimizer) -> dict[str, Any]:
    """A state dict that a bitsandbytes optimizer of the same kind loads: step counts and moments.

    It lacks what bitsandbytes does not have: the bits of parameters beyond their dtype (``param.lo``,
    ``param.compensation``; :func:`fused_optim.full_precision` gives such weights whole), the ``radius`` of
    matrices and every option but learning rate, betas, eps and decay.

    Args:
        optimizer: ``AdamW``, ``Adam``, ``Lion`` or ``SGD`` with momentum, with ``state_codec="int8"``; states
            that ``keep_fp32`` kept stay fp32 there too.

    Raises:
        ValueError: an optimizer that bitsandbytes does not have, such as ``Muon`` and ``amsgrad=True``,
            masks, or states in another codec.

    Example:
        >>> import fused_optim
        >>> weight = torch.nn.Parameter(torch.zeros(64, 64))
        >>> optimizer = fused_optim.AdamW8bit([weight])
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> to_bitsandbytes(optimizer)["state"][0]["step"]
        1
    """
    _check_kind(optimizer)
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    index = 0
    for group_index, group in enumerate(optimizer.param_groups):
        shared = {key: group[key] for key in _SHARED if key in group}
        if "momentum" in group:
            shared["betas"] = group["momentum"], group["dampening"]
        first = index
        for position, param in enumerate(group["params"]):
            if optimizer.state.get(param):
                state[index] = _to_entry(optimizer, group_index, position, param)
            index += 1
        groups.append({**_GROUP_DEFAULTS, **shared, "params": list(range(first, index))})
    return {"state": state, "param_groups": groups}


def _to_entry(optimizer: FusedOptimizer, group: int, position: int, param: Tensor) -> dict[str, Any]:
    key, entry = optimizer._key(group, position, param), optimizer.state[param]
    name = optimizer._name(group, position)
    if key.rule.inner is not None:
        raise ValueError(
            f"{name} has a mask, which bitsandbytes does not have: keep optimizer.state_dict(), or train the "
            "weights on without sparsity"
        )
    wrapped: dict[str, Tensor] = {}
    for number, (slot, codec) in enumerate(zip(key.rule.slots, key.states, strict=True), 1):
        if codec.name == "fp32":
            wrapped[f"state{number}"] = entry[slot.name].clone(memory_format=torch.contiguous_format)
            continue
        if codec != for_slot("int8", slot.signed):
            raise ValueError(
                f"{slot.name} of {name} is stored as {codec.name!r}; bitsandbytes has 'int8' and 'fp32'. "
                "Load a portable state dict into an optimizer with state_codec='int8'"
            )
        planes = entry
        if not entry[slot.name].is_contiguous():
            # There, a step makes the parameter contiguous, and blocks run through that.
            values = states.decode(param, entry, slot.name, codec).contiguous()
            planes = states.encode(values, values, slot.name, codec)
        codes, scales = planes[slot.name], planes[slot.name + ".scale"]
        wrapped[f"state{number}"], wrapped[f"absmax{number}"] = codes.clone(), scales.clone()
        wrapped[f"qmap{number}"] = torch.from_numpy(dynamic_map(slot.signed)).to(param.device)
    return {"step": int(entry["step"]), _WRAPPED: wrapped}
