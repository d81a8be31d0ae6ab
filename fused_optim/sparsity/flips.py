"""How often masks change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.finders import Finder
from ..master import full_precision
from ..optimizer import FusedOptimizer
from ..recipe import Sparsity
from ..shards import spread, sum_of_ranks
from ..storage import local_view
from .masks import count_flips, pack_mask
from .state import unique_names, why_dense


class _Place(NamedTuple):
    """A parameter with masks: those in the optimizer's state, or those that ``finder`` finds."""

    name: str
    own_name: str
    param: Tensor
    recipe: Sparsity
    finder: Finder | None


class FlipRate:
    """Which part of the masked weights changed their place in the mask since the last look.

    ``r = |M - M'| / D``: bits that differ between two masks of ``D`` weights. Masks are those that the
    optimizer keeps, and before a parameter's first step those that this will find; a dense optimizer is
    measured by the masks that ``recipe`` would find in its weights, always its last pattern. Constructing
    takes the first look. What a recipe prunes at once, after a dense beginning, flips by this definition too,
    and so does what returns at a dense end.

    Masks that the optimizer keeps cost 1/4 byte read per weight, no look at the weights, and nothing waits
    for the device; for a dense optimizer all weights are read. The last masks are kept: 1/8 byte per weight.
    Of a DTensor all ranks' flips are counted, so every rank must look.

    Args:
        optimizer: any class of this library; parameters that it is given later are not looked at.
        recipe: whose masks are meant, for an optimizer without the option ``sparsity``. With it the recipe
            may be given too, and must find the same masks as the optimizer's own.

    Raises:
        ValueError: no ``sparsity`` and no recipe, no parameter that can have masks, or recipes of different
            patterns.
        TypeError: another library's optimizer, or no recipe.

    Example:
        >>> import torch, fused_optim
        >>> from fused_optim.sparsity import SRSTE, FlipRate
        >>> weight = torch.nn.Parameter(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
        >>> optimizer = fused_optim.SGD([("up", weight)], lr=1.0)
        >>> flips = FlipRate(optimizer, SRSTE())
        >>> weight.grad = torch.tensor([[0.0, 2.0, 0.0, 0.0]])
        >>> optimizer.step()
        >>> flips.measure(), flips.by_name()
        (tensor(0.5000, dtype=torch.float64), {'up': tensor(0.5000, dtype=torch.float64)})

    Source:
        Hu et al., Accelerating Transformer Pre-training with 2:4 Sparsity, arXiv 2404.01847.
    """

    def __init__(self, optimizer: FusedOptimizer, recipe: Sparsity | None = None) -> None:
        given: Any = (optimizer, recipe)
        if not isinstance(given[0], FusedOptimizer):
            raise TypeError(f"optimizer must be one of fused_optim's, got {type(optimizer).__name__}")
        if recipe is not None and not isinstance(given[1], Sparsity):
            raise TypeError(f"recipe must be one of fused_optim.sparsity such as SRSTE(), got {recipe!r}")
        self._optimizer = optimizer
        self._places = _rename(list(_places(optimizer, recipe)))
        self._masks = [self._mask(place) for place in self._places]
        self._rates: dict[str, Tensor] = {}

    def measure(self) -> Tensor:
        """Looks at the masks: the flip rate of all masked weights together since the last look.

        Returns:
            A float64 tensor without dimensions on the device of the first masked parameter.
        """
        masks = [self._mask(place) for place in self._places]
        changes = zip(self._places, self._masks, masks, strict=True)
        counts = [_of_all_ranks(count_flips(old.to(new.device), new), p.param) for p, old, new in changes]
        numels = [place.param.numel() for place in self._places]
        self._masks = masks
        self._rates = {
            place.name: count.double() / numel
            for place, count, numel in zip(self._places, counts, numels, strict=True)
        }
        return torch.stack([count.to(counts[0].device) for count in counts]).sum().double() / sum(numels)

    def by_name(self) -> dict[str, Tensor]:
        """The flip rate of each parameter at the last :meth:`measure`, for :func:`report`.

        A parameter without a name of its own is called as in messages (``"parameter 0 of group 0"``).

        Raises:
            ValueError: nothing has been measured yet.
        """
        if not self._rates:
            raise ValueError("there are no flip rates yet; call measure() after some steps")
        return dict(self._rates)

    def state_dict(self) -> dict[str, Tensor]:
        """The masks of the last look by name, packed, for a checkpoint; they are not copied."""
        return {place.name: mask for place, mask in zip(self._places, self._masks, strict=True)}

    def load_state_dict(self, masks: Mapping[str, Tensor]) -> None:
        """Takes the masks of another last look, so that a resumed training measures what a whole one does.

        Raises:
            ValueError: masks of other parameters.
            TypeError: masks that are not packed.
        """
        own = self.state_dict()
        if masks.keys() != own.keys():
            raise ValueError(f"masks of {sorted(masks)} are not those of {sorted(own)}: of another optimizer")
        for name, mask in own.items():
            count_flips(mask, masks[name].to(mask.device))
        self._masks = [masks[name].to(mask.device, copy=True) for name, mask in own.items()]

    @torch.no_grad()
    def _mask(self, place: _Place) -> Tensor:
        """A copy of a parameter's mask, one bit per weight that this rank holds."""
        state, param, recipe = self._optimizer.state.get(place.param, {}), place.param, place.recipe
        finder, kept, weights = place.finder, recipe.n, "param"
        if finder is None:
            if state.get("mask") is not None:
                return state["mask"].clone()
            t = float(state.get("step", 0.0))
            finder, kept = recipe.finder(place.name, place.own_name, param, t), recipe.kept(t)
            weights = "param" if state.get("dense") is None else "dense"
        assert finder is not None
        values = local_view(full_precision(self._optimizer, param, weights))
        return pack_mask(finder.find(values, kept), like=local_view(param))


def _places(optimizer: FusedOptimizer, recipe: Sparsity | None) -> Iterator[_Place]:
    """Every parameter with masks.

    Raises:
        ValueError: there is none, or the given recipe and the optimizer's own differ.
    """
    sparse = any(group["sparsity"] is not None for group in optimizer.param_groups)
    if not sparse and recipe is None:
        raise ValueError("the optimizer has no option sparsity; give the recipe whose masks are meant")
    reasons: dict[str, str] = {}
    found = False
    for group, position, param in optimizer._parameters():
        name, own_name = optimizer._name(group, position), optimizer._parameter_name(group, position)
        own = optimizer.param_groups[group]["sparsity"]
        meant, theirs = (_last_pattern(r, name, own_name, param) for r in (recipe, own))
        if sparse and recipe is not None and meant != theirs:
            raise ValueError(
                f"recipe and the optimizer's sparsity find different masks of {name}; give the same "
                "pattern, dim and apply_to to both, or leave recipe out"
            )
        used = own if sparse else recipe
        finder = (theirs if sparse else meant)[1]
        if finder is not None and param.numel():
            assert used is not None
            found = True
            yield _Place(name, own_name, param, used, None if sparse else finder)
        reasons[own_name or name] = why_dense(used, own_name, param) or "it has no weights"
    if not found:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
        raise ValueError(f"no parameter can have masks ({listed}); give another pattern or apply_to")


def _last_pattern(
    recipe: Sparsity | None, name: str, own_name: str, param: Tensor
) -> tuple[int, Finder | None]:
    """How many weights of a group are kept in the end, and how they are found."""
    finder = None if recipe is None else recipe.finder(name, own_name, param, math.inf)
    return 0 if recipe is None or finder is None else recipe.n, finder


def _rename(places: list[_Place]) -> list[_Place]:
    """By the user's names where these differ."""
    names = unique_names([(place.name, place.own_name) for place in places])
    return [place._replace(name=name) for place, name in zip(places, names, strict=True)]


def _of_all_ranks(count: Tensor, param: Tensor) -> Tensor:
    """The sum of what ranks count in their shards."""
    found = spread(param)
    return count if found is None else sum_of_ranks(count, *found)
