"""What an optimizer knows of its masks: which parameters have them, what they are, how they change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import masking
from ..kernels.launch import Key
from ..optimizer import FusedOptimizer
from ..recipe import Sparsity
from ..storage import local_view
from .masks import unpack_mask

NOT_MEANT = "not meant by apply_to"


class Place(NamedTuple):
    """A parameter, what the optimizer calls it, and whether it has masks."""

    name: str
    shape: tuple[int, ...]
    pattern: str
    reason: str


def _masked(optimizer: FusedOptimizer) -> Iterator[tuple[int, int, Tensor, Key]]:
    for group, position, param in optimizer._parameters():
        key = optimizer._key(group, position, param)
        if key.rule.inner is not None:
            yield group, position, param, key


@torch.no_grad()
def apply_masks(optimizer: FusedOptimizer) -> None:
    """Masks the weights now, as a step would leave them: for a first forward pass that is sparse already.

    A recipe that shows the model masked weights does so from the end of the first step on; call this before
    the training, or after the parameters have been changed from outside (the dense weights of masked
    parameters are taken from them if the optimizer has none).

    Args:
        optimizer: with the option ``sparsity``.

    Example:
        >>> import torch, fused_optim
        >>> from fused_optim.sparsity import SRSTE, apply_masks
        >>> layer = torch.nn.Linear(8, 8)
        >>> optimizer = fused_optim.AdamW(layer.parameters(), sparsity=SRSTE())
        >>> apply_masks(optimizer)
        >>> int((layer.weight == 0).sum())
        32
    """
    for group, position, param, key in list(_masked(optimizer)):
        masking.complete(optimizer, group, position, key)
        masking.show(optimizer, group, param, key)


def masks_of(optimizer: FusedOptimizer) -> dict[str, Tensor]:
    """The mask of every masked parameter that has taken a step, as a bool tensor of what this rank holds.

    By the names that the optimizer was given; without any, or where two are the same, by those in messages
    (``"parameter 0 of group 0"``).

    Example:
        >>> import torch, fused_optim
        >>> from fused_optim.sparsity import SRSTE, masks_of
        >>> layer = torch.nn.Linear(8, 2)
        >>> optimizer = fused_optim.AdamW(layer.named_parameters(), sparsity=SRSTE())
        >>> layer(torch.ones(8)).sum().backward()
        >>> optimizer.step()
        >>> [(name, int(mask.sum())) for name, mask in masks_of(optimizer).items()]
        [('weight', 8)]
    """
    found = [
        (group, position, unpack_mask(optimizer.state[param]["mask"], like=local_view(param)))
        for group, position, param, _ in _masked(optimizer)
        if "mask" in optimizer.state.get(param, {})
    ]
    names = unique_names([(optimizer._name(g, i), optimizer._parameter_name(g, i)) for g, i, _ in found])
    return {name: mask for name, (_, _, mask) in zip(names, found, strict=True)}


def unique_names(names: Sequence[tuple[str, str]]) -> list[str]:
    """Of a name in messages and the user's own, which may be empty: the latter where no two are the same."""
    known = Counter(own for _, own in names)
    return [own if own and known[own] == 1 else name for name, own in names]


def listing(optimizer: FusedOptimizer) -> list[Place]:
    """Every parameter with its pattern, or with the reason why it is left dense.

    Example:
        >>> import torch, fused_optim
        >>> from fused_optim.sparsity import SRSTE, listing
        >>> layer = torch.nn.Linear(6, 8)
        >>> optimizer = fused_optim.AdamW(layer.named_parameters(), sparsity=SRSTE())
        >>> for place in listing(optimizer):
        ...     print(place.name, place.pattern, place.reason)
        weight dense dimension 1 has 6 weights, no multiple of 4
        bias dense not meant by apply_to
    """
    places = []
    for group, position, param in optimizer._parameters():
        recipe = optimizer.param_groups[group]["sparsity"]
        own_name = optimizer._parameter_name(group, position)
        name = own_name or optimizer._name(group, position)
        reason = why_dense(recipe, own_name, param)
        pattern = "dense" if recipe is None or reason else f"{recipe.n}:{recipe.m}"
        places.append(Place(name, tuple(param.shape), pattern, reason))
    return places


def why_dense(recipe: Sparsity | None, own_name: str, param: Tensor) -> str:
    """Why a recipe leaves a parameter dense; empty if it does not."""
    if recipe is None:
        return "no sparsity option"
    return recipe.unfit(param) or "" if recipe.means(own_name, param) else NOT_MEANT
