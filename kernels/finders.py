"""How masks follow from weights outside of a step: any group size, any dimension, any strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from . import compiled_masks
from .magnitude_masks import best_of_blocks, largest_of_groups


class Finder(Protocol):
    """How masks follow from weights, for those that kernels cannot find while they update."""

    @property
    def size(self) -> int:
        """Of the groups."""
        ...

    def find(self, w: Tensor, kept: Any) -> Tensor:
        """A bool tensor like the weights; ``kept`` is a number, or a tensor on their device."""
        ...


@dataclass(frozen=True)
class Groups:
    """Groups of ``size`` neighbours along a dimension."""

    size: int
    dim: int

    def find(self, w: Tensor, kept: Any) -> Tensor:
        """The ``kept`` largest magnitudes of every group."""
        if not isinstance(kept, Tensor):
            found = compiled_masks.of_groups(w, self.size, int(kept), self.dim)
            if found is not None:
                return found
        return largest_of_groups(w, self.size, kept, self.dim)


@dataclass(frozen=True)
class Blocks:
    """Blocks of four rows and columns, two of which are kept in every row and column."""

    size: int = 4

    def find(self, w: Tensor, kept: Any) -> Tensor:
        """The largest sum of magnitudes; all weights if more than two are to be kept."""
        found = compiled_masks.of_blocks(w)
        found = best_of_blocks(w) if found is None else found
        return found | (kept > 2)
