"""State dicts: exact and as stored, or portable; checked against the optimizer before anything is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import states, storage
from .checks import check_apart
from .kernels.masking import MASK, keeps_dense
from .kernels.spec import Rule
from .options import ENGINE_OPTIONS, OPTION_DEFAULTS, check_codecs, check_group

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

OWN_KEY = "fused_optim"
FORMAT = 1
MASKS_KEY = "fused_optim_masks"
"""Of a portable state dict: masks, dense weights and the count of steps that they belong to.

They are not part of the state: torch.optim would carry them along and save them again, long out of date.
"""


def save(optimizer: FusedOptimizer, portable: bool, unknown: Collection[str]) -> dict[str, Any]:
    """What ``state_dict`` returns: torch's hooks come before and after everything, as in torch."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    plain = _numbered(optimizer)
    packed = _pack_portable(optimizer, plain, unknown) if portable else _pack(optimizer, plain)
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        result = post_hook(optimizer, packed)
        packed = packed if result is None else result
    return packed


def _numbered(optimizer: FusedOptimizer) -> dict[str, Any]:
    """State and groups with numbers in place of parameters, as torch.optim gives them."""
    numbers: dict[int, int] = {}
    for index, (_, _, param) in enumerate(optimizer._parameters()):
        numbers.setdefault(id(param), index)
    kept = dict[Any, Any](optimizer.state)
    state = {numbers[id(key)] if isinstance(key, Tensor) else key: entry for key, entry in kept.items()}
    groups = [
        {**group, "params": [numbers[id(param)] for param in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


def _pack(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state as it is stored, with step counts that have memory of their own.

    Blocks that share a scale cannot be cut anew for another number of ranks, so a DTensor's are decoded;
    loading encodes them again.
    """
    places = _places(optimizer)
    state: dict[Any, Any] = {}
    for index, entry in state_dict["state"].items():
        kept = _kept(optimizer, *places[index]) if index in places else entry
        state[index] = {key: value.clone() if key == "step" else value for key, value in kept.items()}
    groups = [
        {key: _safe(value) if key in _OBJECTS else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    own = {"format": FORMAT, "skipped_steps": optimizer.skipped_steps}
    return {**state_dict, "state": state, "param_groups": groups, OWN_KEY: own}


_OBJECTS = ("spectral", "sparsity", "keep_fp32")


def _safe(value: Any) -> Any:
    """An object's name in its place: objects cannot be saved safely, and loading keeps an optimizer's own.

    The key stays: torch's helpers look for every option of a group.
    """
    if value is None or isinstance(value, int | str | list | tuple):
        return value
    # Not repr: addresses differ from process to process.
    return getattr(value, "__qualname__", type(value).__qualname__)


def _places(optimizer: FusedOptimizer) -> dict[int, tuple[int, int, Tensor]]:
    """Group, position in it and parameter by the number that a state dict gives it."""
    return dict(enumerate(optimizer._parameters()))


def _kept(optimizer: FusedOptimizer, group: int, position: int, param: Tensor) -> dict[str, Any]:
    """A parameter's state as its options are; of a DTensor, codes of 8 and 4 bits are decoded."""
    entry, key = dict(optimizer.state[param]), optimizer._key(group, position, param)
    for orphan in states.orphans(entry, key.rule, states.Stored(key.param, key.states)):
        del entry[orphan]
    if not storage.is_dtensor(param):
        return entry
    for slot, codec in zip(key.rule.slots, key.states, strict=True):
        if (codec.block > 1 or codec.name == "mask") and slot.name in entry:
            value = states.decode(param, entry, slot.name, codec)
            for plane in codec.planes:
                del entry[slot.name + plane.suffix]
            entry[slot.name] = value
    entry.pop(storage.ORDER, None)
    for name, value in entry.items():
        # No collective takes int16; loading copies it back.
        if isinstance(value, Tensor) and value.dtype is torch.int16:
            entry[name] = value.int()
    return entry


def _pack_portable(
    optimizer: FusedOptimizer, state_dict: dict[str, Any], unknown: Collection[str]
) -> dict[str, Any]:
    """The state in fp32 without what torch.optim does not know; masks stand beside it."""
    groups = [
        {key: value for key, value in group.items() if key not in OPTION_DEFAULTS and key not in unknown}
        for group in state_dict["param_groups"]
    ]
    places = _places(optimizer)
    state = {
        index: _portable(optimizer, *places[index], unknown) if index in places else entry
        for index, entry in state_dict["state"].items()
    }
    masks = {index: _masks(optimizer, *places[index]) for index in state if index in places}
    masks = {index: entry for index, entry in masks.items() if entry}
    portable = {**state_dict, "state": state, "param_groups": groups}
    return {**portable, MASKS_KEY: masks} if masks else portable


def _masks(optimizer: FusedOptimizer, group: int, position: int, param: Tensor) -> dict[str, Tensor]:
    """A parameter's mask and dense weights in values, if it has any, and after how many steps."""
    entry, key = optimizer.state[param], optimizer._key(group, position, param)
    own = {
        slot.name: states.decode(param, entry, slot.name, codec)
        for slot, codec in zip(key.rule.slots, key.states, strict=True)
        if slot.codec is not None and entry.get(slot.name) is not None
    }
    if MASK.name in own:
        own[MASK.name] = own[MASK.name].bool()
    return {**own, "step": entry["step"].clone()} if own else {}


def _with_masks(
    entry: dict[str, Any], masks: Mapping[str, Tensor], rule: Rule, param: Tensor
) -> dict[str, Any]:
    """An entry with as much of them as its optimizer keeps: without masks it goes on as torch.optim does."""
    names = {slot.name for slot in rule.slots if slot.codec is not None} & set(masks)
    if not names:
        return entry
    # Momentum before the first step is nothing in torch's form.
    blank = {slot.name for slot in rule.slots if slot.name in entry and entry[slot.name] is None}
    zeros = {name: torch.zeros_like(param) for name in blank}
    return {"step": masks["step"], **entry, **zeros, **{name: masks[name].float() for name in names}}


def _portable(
    optimizer: FusedOptimizer, group: int, position: int, param: Tensor, unknown: Collection[str]
) -> dict[str, Any]:
    """A parameter's state in values, other entries as they are."""
    entry, key = optimizer.state[param], optimizer._key(group, position, param)
    if not all(slot.signed for slot in key.rule.slots):
        # Second moments need their count, also where torch's class has none: beside Muon.
        unknown = {name for name in unknown if name != "step"}
    planes = storage.planes_of(key.param, key.rule, key.states)
    left_out = {storage.ORDER, *states.orphans(entry, key.rule, states.Stored(key.param, key.states))}
    values = {
        name: value.clone() if name == "step" else value
        for name, value in entry.items()
        if name not in unknown and name not in planes and name not in left_out
    }
    for slot, codec in zip(key.rule.slots, key.states, strict=True):
        if slot.codec is None and entry.get(slot.name) is not None:
            values[slot.name] = states.decode(param, entry, slot.name, codec)
    # A buffer before its first step is no buffer: torch would take its zeros for momentum.
    return dict.fromkeys(values) if "step" in unknown and not entry["step"] else values


def unpack(
    optimizer: FusedOptimizer, state_dict: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[Any, Any], Tensor | None]:
    """Groups, state and the count of skipped steps that an optimizer takes over from a state dict.

    Raises:
        ValueError: it belongs to another model, optimizer or codec, or to a later format.
    """
    _check(state_dict)
    own = state_dict.get(OWN_KEY)
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
        # Names are this process's as well: wrappers of modules put prefixes before them.
        kept = {name: live[name] for name in (*ENGINE_OPTIONS, "params", "param_names") if name in live}
        # torch.optim does not know all options: what a file does not say stays as it is here.
        merged = {**optimizer.defaults, **live, **saved, **kept}
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
        entry = _without_blanks(entry)
        saved_group = saved_groups[group] if own is not None or _is_ours(saved_groups[group]) else None
        values = own is None and not _has_planes(entry)
        masks = state_dict.get(MASKS_KEY, {}).get(key, {})
        state[param] = _load(optimizer, (group, position), groups[group], entry, saved_group, values, masks)
    skipped = own["skipped_steps"] if own is not None else 0
    return groups, state, torch.tensor(skipped, device="cpu") if skipped else None


def _check(state_dict: Mapping[str, Any]) -> None:
    """Refuses what no optimizer wrote.

    Raises:
        ValueError: a part is missing or of another type, a parameter comes twice, or a later format.
    """
    for part, kind in (("state", "a dict"), ("param_groups", "a list")):
        value = state_dict.get(part)
        if not isinstance(value, Mapping if part == "state" else list | tuple):
            given = "nothing" if value is None else repr(value)
            raise ValueError(
                f"{part!r} of the state dict must be {kind}, got {given}: it is not an optimizer's, or it is "
                "damaged"
            )
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(f"group {index} of the state dict has no list of 'params': it is damaged")
        names = group.get("param_names")
        if names is not None and (not isinstance(names, list | tuple) or len(names) != len(group["params"])):
            raise ValueError(
                f"group {index} of the state dict has {len(group['params'])} parameters and as 'param_names' "
                f"{names!r}: it is damaged"
            )
    ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
    twice = [key for key in dict.fromkeys(ids) if ids.count(key) > 1] if len(set(ids)) < len(ids) else []
    if twice:
        raise ValueError(f"the state dict lists the parameters {twice} more than once: it is damaged")
    for key in set(ids) & set(state_dict["state"]):
        if not isinstance(state_dict["state"][key], Mapping):
            raise ValueError(
                f"the state dict holds {type(state_dict['state'][key]).__name__} as the state of parameter "
                f"{key}, a dict is expected: it is damaged"
            )
    _check_masks(state_dict)
    own = state_dict.get(OWN_KEY)
    if own is None:
        return
    counts = [own.get(name) for name in ("format", "skipped_steps")] if isinstance(own, Mapping) else [None]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError(
            f"the state dict's own entry {OWN_KEY!r} is {own!r}, a format and a number of skipped steps are "
            "expected: it is damaged"
        )
    if own["format"] > FORMAT:
        raise ValueError(
            f"the state dict has format {own['format']}, this fused_optim reads up to {FORMAT}: update it"
        )


def _check_masks(state_dict: Mapping[str, Any]) -> None:
    masks = state_dict.get(MASKS_KEY, {})
    entries: list[Any] = list(masks.values()) if isinstance(masks, Mapping) else [None]
    if not all(
        isinstance(entry, Mapping)
        and "step" in entry
        and all(isinstance(value, Tensor) for value in entry.values())
        for entry in entries
    ):
        raise ValueError(
            f"the state dict's entry {MASKS_KEY!r} lacks tensors or a step count of a parameter: "
            "it is damaged"
        )
    strangers = [key for key in masks if key not in state_dict["state"]]
    if strangers:
        raise ValueError(
            f"the state dict's entry {MASKS_KEY!r} holds masks of {strangers}, of which there is no state: "
            "if 'state' was given other keys, give them here as well"
        )


def _without_blanks(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry without the empty dicts that torch's flattened form has for planes that are not in a file."""
    return {key: value for key, value in entry.items() if not (isinstance(value, Mapping) and not value)}


def _is_ours(group: Mapping[str, Any]) -> bool:
    """Whether this library saved a group as stored: torch's helpers leave out nothing but our own entry."""
    return "state_codec" in group and "param_codec" in group


def _has_planes(entry: Mapping[str, Any]) -> bool:
    """Whether an entry cannot be plain values: a state of several planes, or codes."""
    return any(
        _are_codes(value) or ("." in key and isinstance(value, Tensor)) for key, value in entry.items()
    )


def _are_codes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.uint8, torch.int8)


_STORAGE = {False: "state_codec", True: "state_codec and param_codec"}


def _storage(group: dict[str, Any], rule: Rule) -> str:
    """What a group says of storage, dense weights being a state too."""
    weights = f" with weights as {group['param_codec']!r}" if keeps_dense(rule) else ""
    return f"{group['state_codec']!r}{weights}"


def _load(
    optimizer: FusedOptimizer,
    place: tuple[int, int],
    group: dict[str, Any],
    entry: dict[str, Any],
    saved: dict[str, Any] | None,
    values: bool,
    masks: Mapping[str, Tensor],
) -> dict[str, Any]:
    """One parameter's state, in the optimizer's codecs.

    ``saved``: its group, if this library saved it; ``values``: as plain values nevertheless; ``masks``: what
    a portable state dict has beside the state.
    """
    name, own_name, param = (
        optimizer._name(*place),
        optimizer._parameter_name(*place),
        group["params"][place[1]],
    )
    rule, *_ = optimizer._rule_of(group, name, own_name, param)
    now = states.Stored(*storage.codecs(name, own_name, param, group, rule))
    entry = _with_masks(entry, masks, rule, param)
    if not any(value is not None for value in entry.values()):
        return {}
    check_apart([name], [storage.local_view(param)])
    if saved is None or values:
        return states.load(name, entry, param, rule, now, None, ours=saved is not None)
    # What keep_fp32 says now: what it said then is seen in the planes.
    given = {"state_codec": "auto", "param_codec": "auto", **saved, "keep_fp32": group["keep_fp32"]}
    try:
        check_codecs(given)
    except ValueError as error:
        raise ValueError(f"in the state dict, {error}: it is damaged, or of a later version") from None
    saved_param, saved_states = storage.codecs(name, own_name, param, given, rule)
    if saved_states != now.states:
        raise ValueError(
            f"the state dict keeps the states of {name} as {_storage(given, rule)}, the optimizer as "
            f"{_storage(group, rule)}; construct it with the same {_STORAGE[keeps_dense(rule)]}, or save "
            "with state_dict(portable=True)"
        )
    unexempted = storage.codecs(name, own_name, param, {**given, "keep_fp32": ()}, rule)[1]
    before = states.Stored(saved_param, unexempted)
    return states.load(name, entry, param, rule, now, before, ours=True)
