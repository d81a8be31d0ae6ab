"""Pruning models once, checking that they are sparse, and saying how much it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cuts import ApplyTo, applies, check_apply_to, is_hidden_matrix
from ..recipe import check_pattern, input_dim
from .masks import check_groups, check_mask, group_counts, nm_mask


class Weight(NamedTuple):
    """A parameter that can be sparse, and the dimension along which its groups lie."""

    name: str
    param: Tensor
    dim: int


def weights(model: nn.Module, m: int, dim: int | None, apply_to: ApplyTo | None) -> Iterator[Weight]:
    """Every weight that is meant, once if it is shared.

    Raises:
        ValueError: a weight that is meant by name or function cannot have groups.
    """
    names: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    for param, known in names.items():
        along = input_dim(param) if dim is None else dim
        if apply_to is None:
            # A head that is tied to an embedding is an embedding.
            meant = param.is_floating_point() and all(is_hidden_matrix(name, param) for name in known)
            meant = meant and -param.ndim <= along < param.ndim and param.shape[along] % m == 0
        else:
            meant = param.ndim >= 2 and any(applies(apply_to, name, param) for name in known)
        if not meant:
            continue
        if ".parametrizations." in f".{known[0]}":
            raise ValueError(
                f"{known[0]} is what a parametrization starts from, not what its layer computes with: call "
                "unmask_forward or WeightScale.fold first"
            )
        try:
            check_groups(param, 1, m, along)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{known[0]}: {error}; apply_to says which weights are meant") from None
        yield Weight(known[0], param, along % param.ndim)


def _check(model: Any, n: int, m: int, dim: Any, apply_to: ApplyTo | None) -> None:
    check_pattern(n, m)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise TypeError(f"dim must be an integer or None, got {dim!r}")
    if apply_to is not None:
        check_apply_to(apply_to)


@torch.no_grad()
def prune(
    model: nn.Module, n: int = 2, m: int = 4, *, dim: int | None = None, apply_to: ApplyTo | None = None
) -> list[str]:
    """Sets all but the ``n`` largest of every ``m`` neighbouring weights of a model to zero, in place.

    Without ``apply_to`` these are the matrices, stacks and convolutions in the middle of the model whose
    width is a multiple of ``m``: no embeddings and heads, known by their names (those of
    :class:`fused_optim.Muon`) or by being tied to one.

    Args:
        model: any module; an optimizer that keeps its own copy of the weights does not see the change.
        n: weights that are kept of each group.
        m: weights of a group, at most 32.
        dim: the dimension along which groups lie; by default that of a layer's inputs, the second of
            convolutions and the last of everything else.
        apply_to: ``"matrices"``, name patterns, or a function of name and parameter. What it names must fit,
            but for vectors, which are never pruned.

    Returns:
        The names of the pruned parameters; a tied one has its first name.

    Raises:
        ValueError: a pattern that keeps none or all, or weights that ``apply_to`` names and that cannot have
            it.
        TypeError: a value of the wrong type.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3), torch.nn.Linear(3, 1))
        >>> prune(model)
        ['0.weight', '1.weight']

    Source:
        Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
    """
    _check(model, n, m, dim, apply_to)
    chosen = list(weights(model, m, dim, apply_to))
    for weight in chosen:
        weight.param.masked_fill_(~nm_mask(weight.param, n, m, weight.dim), 0.0)
    return [weight.name for weight in chosen]


def verify(
    model: nn.Module, n: int = 2, m: int = 4, *, dim: int | None = None, apply_to: ApplyTo | None = None
) -> list[str]:
    """Checks that every group of a model's weights has at most ``n`` that are not zero.

    Args:
        model: any module.
        n: weights that a group may have.
        m: weights of a group.
        dim: as for :func:`prune`.
        apply_to: as for :func:`prune`.

    Returns:
        The names of the checked parameters.

    Raises:
        ValueError: a group has more (the first one is named), no weight is meant, or as for :func:`prune`.
        TypeError: a value of the wrong type.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import prune, verify
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> prune(model) == verify(model)
        True
    """
    _check(model, n, m, dim, apply_to)
    chosen = list(weights(model, m, dim, apply_to))
    if not chosen:
        raise ValueError(f"no weight of the model has groups of {m}; apply_to says which weights are meant")
    for name, param, along in chosen:
        too_many = group_counts(param, m, along) > n
        if bool(too_many.any()):
            place: list[Any] = too_many.nonzero()[0].tolist()
            group = place[along]
            place[along] = slice(group * m, (group + 1) * m)
            where = ", ".join(f"{i.start}:{i.stop}" if isinstance(i, slice) else str(i) for i in place)
            values = param.detach()[tuple(place)].tolist()
            raise ValueError(
                f"{name}[{where}] has more than {n} weights that are not zero: {values}; "
                f"{int(too_many.sum())} of {too_many.numel()} groups do; "
                f"prune(model, {n}, {m}) sets the smallest to zero"
            )
    return [weight.name for weight in chosen]


@dataclass(frozen=True)
class Row:
    """A matrix of a model: what part of it is not zero, what part of its squared norm the mask keeps.

    And which part of its mask changed, where that was measured.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    energy: float | None
    pattern: str
    flips: float | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`report` found; ``print`` shows a table.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import prune, report
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 2))
        >>> _ = prune(model)
        >>> [(row.name, row.density, row.pattern) for row in report(model).rows]
        [('0.weight', 0.5, '2:4')]
    """

    n: int
    m: int
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        moved = any(row.flips is not None for row in self.rows)
        header = ("weight", "shape", "density", "energy kept", *(["flips"] if moved else []), "pattern")
        lines: list[tuple[str, ...]] = [header]
        for row in self.rows:
            shares = (row.density, row.energy, *([row.flips] if moved else []))
            cells = ("" if share is None else f"{share:.4f}" for share in shares)
            lines.append((row.name, "x".join(map(str, row.shape)), *cells, row.pattern))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(
                cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        sizes = [torch.Size(row.shape).numel() for row in self.rows]
        pattern = f"{self.n}:{self.m}"
        sparse = sum(size for size, row in zip(sizes, self.rows, strict=True) if row.pattern == pattern)
        share = sparse / sum(sizes) if sizes else 0.0
        return "\n".join([*table, f"{pattern}: {share:.1%} of {sum(sizes)} weights in matrices"])


def _share_of_squares(w: Tensor, mask: Tensor) -> float:
    # Unscaled squares of very small and very large weights would be zero and infinity.
    squares = (w.double() / w.abs().max()).square()
    return float((squares * mask).sum() / squares.sum())


@torch.no_grad()
def report(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    dim: int | None = None,
    apply_to: ApplyTo | None = None,
    flips: Mapping[str, float | Tensor] | None = None,
) -> Report:
    """How sparse each matrix of a model is, and how much of it an N:M mask keeps.

    Of each parameter with two dimensions or more: the share of weights that are not zero, the share of its
    squared norm that the largest ``n`` of every ``m`` have, and its pattern: ``"2:4"`` (for these ``n`` and
    ``m``), ``"dense"``, or ``"left out"``, which is not meant to be pruned; and how much of its mask changed,
    if that was measured.

    Args:
        model: any module.
        n: weights that are kept of each group.
        m: weights of a group.
        dim: as for :func:`prune`.
        apply_to: as for :func:`prune`.
        flips: flip rates by the model's names, such as those of :meth:`FlipRate.by_name`.

    Returns:
        ``rows`` of ``name``, ``shape``, ``density``, ``energy`` (None where left out), ``pattern`` and
        ``flips`` (None where there are none).

    Raises:
        ValueError: flip rates of parameters that are no matrices of the model, or as for :func:`prune`.
        TypeError: a value of the wrong type.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import report
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> model[0].weight.data = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
        >>> print(report(model))
        weight    shape  density  energy kept  pattern
        0.weight    2x4   0.7500       0.9310  dense
        2:4: 0.0% of 8 weights in matrices
    """
    _check(model, n, m, dim, apply_to)
    meant = {weight.param: weight for weight in weights(model, m, dim, apply_to)}
    given: Any = {} if flips is None else flips
    if not isinstance(given, Mapping):
        raise TypeError(f"flips must map names to flip rates, as FlipRate.by_name does, got {flips!r}")
    matrices = {name: p for name, p in model.named_parameters() if p.ndim >= 2 and p.numel()}
    rates = {name: float(rate) for name, rate in given.items()}
    unknown = [name for name in rates if name not in matrices]
    if unknown:
        raise ValueError(
            f"flips names {', '.join(map(repr, unknown))}, no matrix of the model; give the optimizer "
            "model.named_parameters(), so that both use the same names"
        )
    rows: list[Row] = []
    for name, param in matrices.items():
        density = int(param.count_nonzero()) / param.numel()
        if param not in meant:
            rows.append(Row(name, tuple(param.shape), density, None, "left out", rates.get(name)))
            continue
        along = meant[param].dim
        energy = _share_of_squares(param, nm_mask(param, n, m, along)) if density else 1.0
        pattern = f"{n}:{m}" if check_mask(param, n, m, along) else "dense"
        rows.append(Row(name, tuple(param.shape), density, energy, pattern, rates.get(name)))
    return Report(n, m, tuple(rows))
