"""Checkpoints of bitsandbytes' block-wise 8-bit optimizers, in both directions, without a loss.

``AdamW8bit``, ``Adam8bit``, ``Lion8bit`` and ``SGD8bit`` there keep codes of the same two maps, in the
same blocks of 256, as ``state_codec="int8"`` here; only the names differ.
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
from .kernels.reference.blocks import BLOCK_CODECS
from .kernels.spec import Slot
from .optimizer import FusedOptimizer

_WRAPPED = "__bnb_optimizer_quant_state__"
_GROUP_DEFAULTS: dict[str, Any] = {"eps": 1e-8, "alpha": 0.0, "t_alpha": None, "t_beta3": None}
_SHARED = ("lr", "betas", "eps", "weight_decay")


def from_bitsandbytes(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict for ``optimizer.load_state_dict`` from one of a bitsandbytes optimizer.

    Args:
        optimizer: of the same kind and with ``state_codec="int8"``; it is not changed.
        state_dict: of ``bitsandbytes.optim`` AdamW8bit, Adam8bit, Lion8bit or SGD8bit (0.44 or later).

    Returns:
        Learning rate, betas, eps and decay of the state dict's groups, and its codes and scales.

    Raises:
        ValueError: other groups than the optimizer's, another map, or blocks of another size.

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
    saved, live = state_dict["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in live]:
        raise ValueError(
            f"the bitsandbytes state dict has groups of {[len(g['params']) for g in saved]} parameters, the "
            f"optimizer of {[len(g['params']) for g in live]}; build it from the same parameters"
        )
    groups: list[dict[str, Any]] = []
    for theirs, ours in zip(saved, live, strict=True):
        taken = {key: theirs[key] for key in _SHARED if key in theirs and key in ours}
        if "momentum" in ours:
            # Their SGD keeps both numbers under this name.
            taken |= dict(zip(("momentum", "dampening"), theirs["betas"], strict=True))
        kept = {key: value for key, value in ours.items() if key not in ("params", "keep_fp32")}
        groups.append({**kept, **taken, "params": theirs["params"], "state_codec": "int8"})
    ids = list(chain.from_iterable(group["params"] for group in saved))
    places = {index: place for index, place in zip(ids, optimizer._parameters(), strict=True)}
    state: dict[Any, Any] = {}
    for index, entry in state_dict["state"].items():
        group, position, _ = places[index]
        slots = optimizer._rule(live[group]).slots
        state[index] = _from_entry(optimizer._name(group, position), entry, slots)
    own = {"format": FORMAT, "skipped_steps": 0, "memory_order": {}}
    return {"state": state, "param_groups": groups, OWN_KEY: own}


def _from_entry(name: str, entry: Mapping[str, Any], slots: tuple[Slot, ...]) -> dict[str, Any]:
    flat = {**entry, **entry.get(_WRAPPED, {})}
    result: dict[str, Any] = {"step": torch.tensor(float(entry["step"]), device="cpu")}
    for number, slot in enumerate(slots, 1):
        codes: Tensor | None = flat.get(f"state{number}")
        if codes is None:
            raise ValueError(
                f"the bitsandbytes state dict has no state{number} for {name}: it is of another optimizer"
            )
        result[slot.name] = codes
        if codes.dtype != torch.uint8:
            continue
        expected = torch.from_numpy(dynamic_map(slot.signed))
        if not torch.equal(flat[f"qmap{number}"].cpu().float(), expected):
            raise ValueError(f"state{number} of {name} has another map than the dynamic one of 8 bits")
        scales = flat[f"absmax{number}"]
        block = CODECS["int8"].block
        if len(scales) != -(-codes.numel() // block):
            raise ValueError(
                f"state{number} of {name} has {len(scales)} blocks for {codes.numel()} values; only blocks "
                f"of {block} fit (bitsandbytes 0.44 or later): load it there and save it anew"
            )
        result[slot.name + ".scale"] = scales
    return result


def to_bitsandbytes(optimizer: FusedOptimizer) -> dict[str, Any]:
    """A state dict that a bitsandbytes optimizer of the same kind loads.

    Args:
        optimizer: with ``state_codec="int8"``; states that ``keep_fp32`` kept stay fp32 there too.

    Raises:
        ValueError: states in another codec, which bitsandbytes does not have.

    Example:
        >>> import fused_optim
        >>> weight = torch.nn.Parameter(torch.zeros(64, 64))
        >>> optimizer = fused_optim.AdamW8bit([weight])
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> to_bitsandbytes(optimizer)["state"][0]["step"]
        1
    """
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
    wrapped: dict[str, Tensor] = {}
    for number, (slot, codec) in enumerate(zip(key.rule.slots, key.states, strict=True), 1):
        if codec.name == "fp32":
            wrapped[f"state{number}"] = entry[slot.name].clone()
            continue
        if codec != for_slot("int8", slot.signed):
            raise ValueError(
                f"{slot.name} of {optimizer._name(group, position)} is stored as {codec.name!r}; "
                "bitsandbytes has 'int8' and 'fp32'. Load a portable state dict into an optimizer with "
                "state_codec='int8'"
            )
        codes, scales = entry[slot.name], entry[slot.name + ".scale"]
        if not codes.is_contiguous():
            # There, blocks run through the logical order, whatever the memory's is.
            values = states.decode(param, entry, slot.name, codec)
            encoded, scales = BLOCK_CODECS[codec.name].encode(values.flatten())
            codes = encoded.view(param.shape)
        wrapped[f"state{number}"], wrapped[f"absmax{number}"] = codes.clone(), scales.clone()
        wrapped[f"qmap{number}"] = torch.from_numpy(dynamic_map(slot.signed)).to(param.device)
    return {"step": int(entry["step"]), _WRAPPED: wrapped}
