"""Between recipes and the engine: which rule a masked parameter follows, and how its masks begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .kernels.bucket import Bucket
from .kernels.finders import Finder
from .kernels.late_masks import MaskedWeights
from .kernels.launch import Key, Operands
from .kernels.layout import layout_of
from .kernels.masking import masked
from .kernels.spec import Rule
from .recipe import Sparsity, group_in_kernels
from .states import Stored, decode, encode_local, orphans
from .storage import complete_state, empty_plane, local_view, param_codec, plain_codec

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

# A look at every mask whenever launches are planned anew would wait for the device each time.
_fitting = WeakTensorKeyDictionary()
"""The recipe that each known mask fits."""


def steps_done(recipe: Sparsity, state: Mapping[str, Any]) -> float:
    """Of a parameter, if it decides about more than numbers in a row (reads the device)."""
    return float(state.get("step", 0.0)) if recipe.changes_groups else 0.0


def find(
    recipe: Sparsity, rule: Rule, name: str, own_name: str, param: Tensor, state: Mapping[str, Any]
) -> tuple[Rule | None, Finder | None]:
    """A rule's masked form if the parameter has masks, and how these are found where no kernel can.

    Raises:
        ValueError: a strict recipe is meant for a parameter that cannot be masked.
    """
    finder = recipe.finder(name, own_name, param, steps_done(recipe, state) + 1)
    if finder is None:
        return None, None
    group = group_in_kernels(finder, param)
    return masked(rule, group, recipe.keeps_dense), None if group else finder


def complete(optimizer: FusedOptimizer, group: int, position: int, key: Key, on_device: bool = False) -> None:
    """Adds to a parameter's state what it lacks, such as a mask, and drops what it no longer needs.

    A mask that keeps other numbers of weights than its recipe, or other groups, is found anew.

    Raises:
        ValueError: group sizes change and the host must not know how many steps are done.
    """
    options = optimizer.param_groups[group]
    param, recipe = options["params"][position], options["sparsity"]
    state, name = optimizer.state[param], optimizer._name(group, position)
    complete_state(state, param, key.rule, key.param, key.states)
    if key.rule.inner is None:
        _drop_orphans(state, key)
        return
    if on_device and recipe.changes_groups and param.device.type != "cpu":
        raise ValueError(
            f"the sparsity of {name} changes the size of groups, for which the host must know how many steps "
            "are done: use another recipe with capturable, skip_nonfinite or a loss scaler"
        )
    codecs = {slot.name: codec for slot, codec in zip(key.rule.slots, key.states, strict=True)}
    if "dense" in codecs and state.get("dense") is None:
        weights = _take_weights(name, param, options, state)
        state |= encode_local(param, weights, "dense", codecs["dense"])
    _drop_orphans(state, key)
    known = state.get("mask") is not None
    if known and _fitting.get(state["mask"]) == recipe:
        return
    t = float(state["step"])
    finder = recipe.finder(name, optimizer._parameter_name(group, position), param, t)
    assert finder is not None
    if not known:
        state |= {"mask" + plane.suffix: empty_plane(param, plane) for plane in codecs["mask"].planes}
    weights = weights_of(optimizer, param, key)
    if not known or not _fits(weights.mask(), finder, recipe.kept(t)):
        weights.find(finder, recipe.kept(t))
    _fitting[state["mask"]] = recipe


def _drop_orphans(state: dict[str, Any], key: Key) -> None:
    """Dense weights that stayed behind, for one, would later undo what was learnt since."""
    for orphan in orphans(state, key.rule, Stored(key.param, key.states)):
        del state[orphan]


def _take_weights(name: str, param: Tensor, options: Mapping[str, Any], state: dict[str, Any]) -> Tensor:
    """Weights with every bit that the state keeps beside the parameter, and no longer will."""
    codec = param_codec(name, param, options)
    hidden = ["param" + plane.suffix for plane in codec.planes[1:]]
    if any(state.get(plane) is None for plane in hidden):
        codec = plain_codec(param)
    weights = local_view(decode(param, {**state, "param": param}, "param", codec))
    for plane in hidden:
        state.pop(plane, None)
    return weights


def _fits(mask: Tensor, finder: Finder, kept: Any) -> bool:
    """Whether a mask keeps as many of each group: it is then the one that would be found in itself."""
    return torch.equal(finder.find(mask.float(), kept), mask)


def weights_of(optimizer: FusedOptimizer, param: Tensor, key: Key) -> MaskedWeights:
    """The weights and the mask of a parameter whose state is complete."""
    state, home = optimizer.state[param], local_view(param)
    of_param = [home, *(local_view(state["param" + plane.suffix]) for plane in key.param.planes[1:])]
    of_states = [
        [local_view(state[slot.name + plane.suffix]) for plane in codec.planes]
        for slot, codec in zip(key.rule.slots, key.states, strict=True)
    ]
    return MaskedWeights(key, Operands(of_param, of_states, layout_of(home, home), 0))


def show(optimizer: FusedOptimizer, group: int, param: Tensor, key: Key) -> None:
    """What the mask that a parameter has leaves of the weights as they are now is the parameter."""
    t = float(optimizer.state[param]["step"])
    weights_of(optimizer, param, key).show(optimizer.param_groups[group]["sparsity"].pruned(t)[2])


def show_loaded(optimizer: FusedOptimizer) -> None:
    """What masks leave of dense weights that were loaded are the parameters.

    A step without gradients, by which torch's helpers make an optimizer's state before they load it, has put
    what its own masks left of them there.
    """
    for group, position, param in optimizer._parameters():
        state = optimizer.state.get(param, {})
        if state.get("mask") is not None and state.get("dense") is not None and not param.is_meta:
            with torch.no_grad():
                home = local_view(param)
                before = home.clone()
                show(optimizer, group, param, optimizer._key(group, position, param))
                # A step rounds weights once, and what is read from their bits would be rounded twice.
                if torch.allclose(home, before, rtol=4 * torch.finfo(home.dtype).eps, atol=0, equal_nan=True):
                    home.copy_(before)


def in_frame(buckets: Sequence[Bucket], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every bucket still has the group sizes that its recipe wants in the coming step."""
    for bucket in buckets:
        key = bucket.members[0].key
        if key.rule.inner is None or not bucket.launched:
            continue
        size = key.rule.group if key.finder is None else key.finder.size
        # Several recipes may share a launch, some of which never change.
        recipes = [(groups[g]["sparsity"], step) for g, step in bucket.cohorts]
        if any(recipe.changes_groups and recipe.group(step + 1) != size for recipe, step in recipes):
            return False
    return True
