"""Hypersphere optimization: every matrix keeps its Frobenius norm, and a step is an angle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cuts import (
    WORKSPACE_BYTES,
    ApplyTo,
    WholeMatrices,
    applies,
    check_apply_to,
    check_matrices,
    check_names_of,
    check_shared,
)
from .kernels.spec import Hyper, Per

RADII = ("fixed", "current")
RADIUS = ("radius", Per.MATRIX)
# Elements measured together on a CPU: half of the time of all at once (one core, November 2026).
_CACHED = 2**21


def check_radius(radius: Any) -> None:
    """Checks the option ``radius``.

    Raises:
        ValueError: an unknown name.
    """
    if radius not in RADII:
        raise ValueError(f"radius={radius!r} is unknown; allowed: {', '.join(map(repr, RADII))}")


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


def _column(value: Any) -> Any:
    return value.double().view(-1, 1, 1) if isinstance(value, Tensor) else value


def _lengths(u: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of matrices and of their updates, and what the two have in common, in float64."""
    wide, other = p.double(), u.double()
    return _norm(wide), _norm(other), wide.mul_(other).sum((-2, -1), keepdim=True)


def _parts(u: Tensor) -> list[slice]:
    """Matrices that are measured together: on a CPU few enough that float64 copies stay in its caches."""
    size = len(u)
    if u.device.type == "cpu":
        # With as many matrices as threads sums are in the same order, whatever the number of matrices.
        size = max(_CACHED // max(u[0].numel(), 1), torch.get_num_threads(), 1)
    return [slice(start, start + size) for start in range(0, len(u), size)]


def along_sphere(u: Tensor, p: Tensor, lr: Any, decay: Any, radius: Tensor | None, eps: float) -> Tensor:
    """What to subtract from matrices ``p`` so that they move by ``lr`` of their norm against ``u``.

    ``decay`` is what weight decay takes from them first. ``radius`` is their norm, zero where it is not
    known yet, None if it is to be measured. Norms are in float64, and what is left of ``p`` is multiplied by
    a number close to zero, so that nothing cancels. The result takes the place of ``u``.
    """
    lr, kept = _column(lr), 1 - _column(decay)
    parts = _parts(u)
    measured = zip(*(_lengths(u[part], p[part]) for part in parts), strict=True)
    norm, size, inner = (torch.cat(each) for each in measured)
    start = norm if radius is not None else norm * kept
    norm = norm * kept
    start = torch.where(start > 0, start, float(p.shape[-2]) ** 0.5)
    if radius is not None:
        radius.copy_(torch.where(radius > 0, radius, start))
        start = radius.double()
    step = lr * start / size.clamp(min=eps)
    after = (norm**2 - 2 * kept * step * inner + (step * size) ** 2).clamp(min=0).sqrt()
    # A matrix that the step would bring to zero stays where it is.
    scale = torch.where(after > 0, start / after, 1.0)
    shrunk, moved = (1 - scale * kept).float(), (scale * step).float()
    for part in parts:
        torch.addcmul(p[part] * shrunk[part], u[part], moved[part], out=u[part])
    return u


@dataclass(frozen=True)
class Hypersphere:
    """Keeps every matrix on the sphere of its own Frobenius norm: an option of every optimizer.

    With ``R`` the norm of a matrix ``p`` and ``u`` the optimizer's update without learning rate::

        q = (1 - lr * weight_decay) * p - lr * R * u / |u|
        p = R * q / |q|

    so ``lr`` is the tangent of the angle by which a matrix turns, whatever its size. ``radius="fixed"``
    remembers the norm before the first step (state ``radius``, fp32, one number per matrix); ``"current"``
    takes it anew in every step, after weight decay, as the authors' code does, so that it shrinks. A matrix
    of zeros, which has no direction to keep, is sent to the sphere of radius ``sqrt(rows)`` by its first
    update. With a fixed radius a zero update changes nothing.

    Args:
        radius: ``"fixed"`` or ``"current"``.
        apply_to: ``"matrices"`` (two dimensions and more), name patterns or a predicate of name and
            parameter; leave embeddings out.
        eps: smallest norm of an update that is divided by.
        workspace_bytes: memory for the matrices that are worked on together; a larger one is alone, and the
            weights and updates of one parameter (8 bytes per element) are there whatever this says.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of the wrong type.

    Example:
        >>> import torch, fused_optim
        >>> from fused_optim.spectral import Hypersphere
        >>> weight = torch.nn.Parameter(torch.eye(4))
        >>> optimizer = fused_optim.Lion([weight], lr=0.1, weight_decay=0.0, spectral=Hypersphere())
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> round(weight.norm().item(), 5)
        2.0

    Source:
        Rethinking Language Model Scaling under Transferable Hypersphere Optimization, arXiv 2603.28743.
    """

    radius: str = "fixed"
    apply_to: ApplyTo = "matrices"
    eps: float = 1e-8
    workspace_bytes: int = WORKSPACE_BYTES

    def __post_init__(self) -> None:
        check_radius(self.radius)
        check_apply_to(self.apply_to)
        eps: Any = self.eps
        if isinstance(eps, bool) or not isinstance(eps, int | float):
            raise TypeError(f"eps must be a positive number, got {eps!r}")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps={eps} must be positive and finite")
        check_shared({}, self.workspace_bytes)

    def cut(self, name: str, own_name: str, param: Tensor) -> _OnSphere | None:
        """What becomes of a parameter's matrices; None for parameters that are left alone."""
        check_names_of(self.apply_to, name, own_name)
        if not applies(self.apply_to, own_name, param):
            return None
        check_matrices(name, param, ())
        return _OnSphere((), self.workspace_bytes, self.radius == "fixed", self.eps)


@dataclass(frozen=True)
class _OnSphere(WholeMatrices):
    """The transformation of :class:`Hypersphere`."""

    fixed: bool = True
    eps: float = 1e-8

    @property
    def shared(self) -> tuple[tuple[str, Per], ...]:
        return (RADIUS,) if self.fixed else ()

    def reads_params(self) -> bool:
        return True

    def scalars(self, hyper: Hyper, step: Any, decay: Any) -> tuple[Any, ...]:
        return hyper["lr"], decay

    def update(self, u: Tensor, scalars: Sequence[Any], shared: Sequence[Tensor], p: Tensor | None) -> Tensor:
        assert p is not None
        lr, decay = scalars
        return along_sphere(u, p, lr, decay, shared[-1] if self.fixed else None, self.eps)
