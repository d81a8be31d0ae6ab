"""What every recipe for N:M sparsity shares: which weights are masked, along which dimension, how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .cuts import ApplyTo, applies, check_apply_to, check_names_of, is_hidden_matrix
from .kernels.finders import Blocks, Finder, Groups
from .kernels.layout import walked
from .kernels.masking import GROUPS
from .shards import widths
from .storage import is_dtensor, local_view

LARGEST_GROUP = 32


def check_pattern(n: Any, m: Any) -> None:
    """Checks a pattern that keeps ``n`` of ``m`` weights.

    Raises:
        ValueError: it keeps none or all, or its groups are too large.
        TypeError: not integers.
    """
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if not 0 < n < m <= LARGEST_GROUP:
        raise ValueError(f"n={n}, m={m}: a pattern keeps n of m neighbours with 0 < n < m <= {LARGEST_GROUP}")


def input_dim(param: Tensor) -> int:
    """The dimension of a layer's inputs: the second of convolutions, else the last."""
    return 1 if param.ndim > 3 else param.ndim - 1


def check_steps(name: str, value: Any, least: int = 1) -> None:
    """Refuses what is no number of steps."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a number of steps, got {value!r}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def check_number(name: str, value: Any) -> None:
    """Refuses what is no finite number from zero on."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value} must be finite and not negative")


@dataclass(frozen=True, kw_only=True)
class Sparsity(ABC):
    """Base of the recipes: ``n`` of every ``m`` neighbouring weights are kept, those of largest magnitude.

    Neighbours lie along the inputs of a layer: the last dimension of matrices and of stacks of matrices
    (experts), dimension 1 of convolutions, whatever their strides. Of equal magnitudes the first is kept; a
    NaN counts as larger than every number.

    Args:
        n: weights that are kept of each group.
        m: weights of a group; at most 32.
        apply_to: which parameters: a function of name and parameter, or name patterns. By default matrices,
            stacks and convolutions in the middle of a model: no embeddings and heads (known by their names:
            give the optimizer ``model.named_parameters()``).
        dim: the dimension along which groups lie, if it is not that of the inputs.
        strict: refuse parameters whose width is no multiple of ``m`` instead of leaving them dense.

    Example:
        >>> from fused_optim.sparsity import SRSTE, Sparsity
        >>> recipe = SRSTE(n=1, apply_to=["layers.*.weight"])
        >>> isinstance(recipe, Sparsity), recipe.n, recipe.m
        (True, 1, 4)
    """

    n: int = 2
    m: int = 4
    apply_to: ApplyTo = is_hidden_matrix
    dim: int | None = None
    strict: bool = False

    keeps_dense: ClassVar[bool] = True
    """Whether pruned weights live on in the optimizer while the model sees what remains of them."""

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m)
        check_apply_to(self.apply_to)
        dim: Any = self.dim
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
            raise TypeError(f"dim must be an integer or None, got {dim!r}")
        self._check()

    def _check(self) -> None:  # noqa: B027
        """Checks a recipe's own arguments, if it has any."""

    @abstractmethod
    def kept(self, t: Any) -> Any:
        """How many of a group are kept when ``t`` steps are done: a number, or a tensor as ``t`` is."""

    def refreshes(self, t: Any) -> Any:
        """Whether the ``t``-th step finds new masks."""
        return True

    def pruned(self, t: Any) -> tuple[Any, Any, Any]:
        """Of pruned weights: whether their gradients count, their decay, and what factor of them remains."""
        return 1.0, 0.0, 0.0

    def row(self, t: Any) -> tuple[Any, ...]:
        """The scalars of the ``t``-th step, see ``kernels/masking.py``."""
        return *self.pruned(t), self.kept(t) * self.refreshes(t)

    def group(self, t: float) -> int:
        """Size of the groups when ``t`` steps are done."""
        return self.m

    @property
    def largest_group(self) -> int:
        """Of all times: the width of a layer must be a multiple of it."""
        return self.m

    @property
    def adjusts_gradients(self) -> bool:
        """Whether gradients of pruned weights are more or less than themselves."""
        return False

    @property
    def changes_groups(self) -> bool:
        """Whether the host must know how many steps are done."""
        return False

    def finder(self, name: str, own_name: str, param: Tensor, t: float) -> Finder | None:
        """How a parameter's masks are found after ``t`` steps; None if it is left dense.

        Raises:
            ValueError: the recipe is meant for it and strict, and it cannot be masked; it has name patterns
                and the parameter no name.
        """
        check_names_of(self.apply_to, name, own_name)
        if not self.means(own_name, param):
            return None
        reason = self.unfit(param)
        if reason is None:
            return self._finder(param, t)
        if self.strict:
            raise ValueError(f"{name} cannot be masked: {reason}; leave it out (apply_to), or strict=False")
        return None

    def means(self, own_name: str, param: Tensor) -> bool:
        """Whether a parameter should have masks."""
        return param.ndim >= 2 and applies(self.apply_to, own_name, param)

    def unfit(self, param: Tensor) -> str | None:
        """Why a parameter cannot have masks."""
        if param.is_complex() or param.dtype == torch.float64:
            return f"its dtype is {param.dtype}, masks are for float32 and below"
        dims = self._dims(param)
        if not all(-param.ndim <= dim < param.ndim for dim in dims):
            return f"it has no dimension {self.dim}"
        for dim in dims:
            # Of all ranks: they must not differ in which parameters have masks.
            for width in sorted(widths(param, dim)):
                if width % self.largest_group or not param.shape[dim]:
                    part = " of a shard" if is_dtensor(param) else ""
                    return f"dimension {dim}{part} has {width} weights, no multiple of {self.largest_group}"
        return None

    def _dims(self, param: Tensor) -> Sequence[int]:
        """Those along which groups lie."""
        return [input_dim(param) if self.dim is None else self.dim]

    def _finder(self, param: Tensor, t: float) -> Finder:
        (dim,) = self._dims(param)
        return Groups(self.group(t), dim % param.ndim)


def group_in_kernels(finder: Finder, param: Tensor) -> int:
    """The size of groups if kernels can mask them while they update the parameter, else 0."""
    if not isinstance(finder, Groups) or finder.size not in GROUPS:
        return 0
    local = local_view(param)
    order = walked(local)
    return finder.size if order and order[-1] == finder.dim else 0


@dataclass(frozen=True, kw_only=True)
class Transposable(Sparsity):
    """Base of recipes whose masks may be 2 of 4 along rows and columns at once."""

    transposable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transposable and (self.n, self.m, self.dim) != (2, 4, None):
            raise ValueError(f"transposable masks are 2:4 of the last two dimensions, not {self.n}:{self.m}")

    def _dims(self, param: Tensor) -> Sequence[int]:
        return [param.ndim - 2, param.ndim - 1] if self.transposable else super()._dims(param)

    def _finder(self, param: Tensor, t: float) -> Finder:
        return Blocks() if self.transposable else super()._finder(param, t)

    def unfit(self, param: Tensor) -> str | None:
        """Why a parameter cannot have masks."""
        if self.transposable and param.ndim > 3:
            return "transposable masks are for matrices and stacks of them"
        return super().unfit(param)
