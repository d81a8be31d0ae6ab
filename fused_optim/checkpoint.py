"""State dicts: exact and as stored, or portable; checked against the optimizer before anything is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import storage
from .options import ENGINE_OPTIONS, OPTION_DEFAULTS, check_group

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

_OWN_KEY = "fused_optim"
_FORMAT = 1


def pack(state_dict: dict[str, Any], skipped: int) -> dict[str, Any]:
    """The state as it is stored, with step counts that have memory of their own."""
    state = {
        index: {key: value.clone() if key == "step" else value for key, value in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state, _OWN_KEY: {"format": _FORMAT, "skipped_steps": skipped}}


def pack_portable(state_dict: dict[str, Any], unknown: Collection[str]) -> dict[str, Any]:
    """The state in fp32 without what torch.optim does not know."""
    groups = [
        {key: value for key, value in group.items() if key not in OPTION_DEFAULTS and key not in unknown}
        for group in state_dict["param_groups"]
    ]
    state = {index: _portable(entry, unknown) for index, entry in state_dict["state"].items()}
    return {**state_dict, "state": state, "param_groups": groups}


def _portable(entry: dict[str, Any], unknown: Collection[str]) -> dict[str, Any]:
    narrow = (torch.bfloat16, torch.float16)
    values = {
        key: value.clone() if key == "step" else value.float() if value.dtype in narrow else value
        for key, value in entry.items()
        if key not in unknown
    }
    # A buffer before its first step is no buffer: torch would take its zeros for momentum.
    return dict.fromkeys(values) if "step" in unknown and not entry["step"] else values


def unpack(
    optimizer: FusedOptimizer, state_dict: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[Any, Any], Tensor | None]:
    """Groups, state and the count of skipped steps that an optimizer takes over from a state dict.

    Raises:
        ValueError: it belongs to another model, optimizer or codec, or to a later format.
    """
    own = state_dict.get(_OWN_KEY)
    if own is not None and own["format"] > _FORMAT:
        raise ValueError(
            f"the state dict has format {own['format']}, this fused_optim reads up to {_FORMAT}: update it"
        )
    saved_groups = deepcopy(state_dict["param_groups"])
    live_groups = optimizer.param_groups
    if len(saved_groups) != len(live_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, the optimizer has {len(live_groups)}"
        )
    groups = []
    for index, (saved, live) in enumerate(zip(saved_groups, live_groups, strict=True)):
        if len(saved["params"]) != len(live["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's "
                f"group: group {index} has {len(saved['params'])} parameters there and "
                f"{len(live['params'])} here"
            )
        kept = {name: live[name] for name in ENGINE_OPTIONS}
        merged = {**optimizer.defaults, **saved, **kept, "params": live["params"]}
        if "param_names" in live:
            merged.setdefault("param_names", live["param_names"])
        check_group(merged)
        groups.append(merged)
    ids = chain.from_iterable(group["params"] for group in saved_groups)
    places = ((g, i) for g, group in enumerate(live_groups) for i in range(len(group["params"])))
    place_of = dict(zip(ids, places, strict=True))
    state: dict[Any, Any] = defaultdict(dict)
    for key, entry in state_dict["state"].items():
        if key not in place_of:
            state[key] = entry
            continue
        group, position = place_of[key]
        param = live_groups[group]["params"][position]
        own_codecs = saved_groups[group].get("state_codec") if own is not None else None
        state[param] = _load(optimizer, (group, position), groups[group], entry, own_codecs)
    skipped = own["skipped_steps"] if own is not None else 0
    return groups, state, torch.tensor(skipped) if skipped else None


def _load(
    optimizer: FusedOptimizer,
    place: tuple[int, int],
    group: dict[str, Any],
    entry: dict[str, Any],
    saved: Any,
) -> dict[str, Any]:
    """One parameter's state, in the optimizer's codecs."""
    name, param = optimizer._name(*place), group["params"][place[1]]
    rule = optimizer._rule(group)
    codecs = storage.state_codecs(name, param, group, rule)
    if not any(value is not None for value in entry.values()):
        return {}
    if saved is not None and storage.state_codecs(name, param, {"state_codec": saved}, rule) != codecs:
        raise ValueError(
            f"the state dict keeps the states of {name} as {saved!r}, the optimizer as "
            f"{group['state_codec']!r}; construct it with the same state_codec, or save "
            "with state_dict(portable=True)"
        )
    return storage.encode_state(name, entry, param, rule, codecs)
