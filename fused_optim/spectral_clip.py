"""SPECTRA: spectral clipping of updates and gradients, an option of every optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cuts import (
    WORKSPACE_BYTES,
    ApplyTo,
    Split,
    WholeMatrices,
    applies,
    check_apply_to,
    check_matrices,
    check_names_of,
    check_shared,
    rows_of_parts,
)
from .kernels.spec import Hyper
from .matrix_functions import soft_clip
from .scalars import cos, limit

_DECAYS: Mapping[str, Callable[[Any], Any]] = {
    "constant": lambda x: 1.0 + 0.0 * x,
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - x**0.5,
    "cosine": lambda x: (1 + cos(math.pi * x)) / 2,
    "square": lambda x: 1 - x**2,
    # Of a factor that ends at zero; others are powers of it.
    "exp": lambda x: 1 - x,
}
# What stands for a threshold of zero: updates vanish.
_LEAST = 1e-30


@dataclass(frozen=True)
class ClipSchedule:
    """How thresholds change: looser while the learning rate warms up, tighter in the last steps.

    In the first ``warmup_steps`` the threshold is ``c * peak_lr / lr``, so that no step is larger than at
    the peak. In the last ``decay_fraction`` of ``total_steps`` it goes from ``c`` to ``final_scale * c``;
    with progress ``x`` from 0 to 1 and ``F = final_scale`` the factor is ``F + (1 - F) f(x)``::

        constant: f = 1      linear: f = 1 - x      sqrt: f = 1 - sqrt(x)
        cosine: f = (1 + cos(pi x)) / 2             square: f = 1 - x**2

    and for ``exp`` it is ``F**x``, or that of ``linear`` where F is 0.

    Args:
        warmup_steps: steps of the learning rate's warmup.
        peak_lr: the learning rate after it; needed with ``warmup_steps``.
        total_steps: of the training; needed unless ``decay`` is constant.
        decay: one of the shapes above.
        decay_fraction: the part of ``total_steps`` that decays, in (0, 1].
        final_scale: what is left of the threshold at the end, in [0, 1]; with 0 the last updates vanish.

    Raises:
        ValueError: a value out of range, or one that is needed and missing.
        TypeError: a value of the wrong type, such as a fraction of a step.

    Example:
        >>> schedule = ClipSchedule(total_steps=100, decay="linear", decay_fraction=0.5, final_scale=0.2)
        >>> [round(schedule(10.0, 1e-3, step), 1) for step in (1, 51, 76, 101)]
        [10.0, 10.0, 6.0, 2.0]

    Source:
        Jiang, Semenov and Stich, Enhancing LLM Training via Spectral Clipping, arXiv 2603.14315.
    """

    warmup_steps: int = 0
    peak_lr: float | None = None
    total_steps: int | None = None
    decay: str = "constant"
    decay_fraction: float = 0.1
    final_scale: float = 0.1

    def __post_init__(self) -> None:
        self._check_types()
        if self.decay not in _DECAYS:
            raise ValueError(f"decay={self.decay!r} is unknown; allowed: {', '.join(_DECAYS)}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not be negative")
        if self.warmup_steps and not (self.peak_lr and self.peak_lr > 0):
            raise ValueError(f"warmup_steps needs peak_lr, the learning rate after it; got {self.peak_lr}")
        if self.decay != "constant" and not (self.total_steps and self.total_steps > 0):
            raise ValueError(f"decay={self.decay!r} needs total_steps; got {self.total_steps}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} must be in (0, 1]")
        if not 0 <= self.final_scale <= 1:
            raise ValueError(f"final_scale={self.final_scale} must be in [0, 1]")

    def _check_types(self) -> None:
        given: Mapping[str, Any] = vars(self)
        for name, kinds, allowed in (
            ("warmup_steps", int, "an integer number of steps"),
            ("peak_lr", int | float | None, "a number or None"),
            ("total_steps", int | None, "an integer number of steps or None"),
            ("decay", str, f"one of {', '.join(_DECAYS)}"),
            ("decay_fraction", int | float, "a number in (0, 1]"),
            ("final_scale", int | float, "a number in [0, 1]"),
        ):
            if isinstance(given[name], bool) or not isinstance(given[name], kinds):
                raise TypeError(f"{name} must be {allowed}, got {given[name]!r}")

    def __call__(self, threshold: float, lr: Any, step: Any) -> Any:
        """The threshold of the ``step``-th step, counted from 1: a float, or a tensor as ``step`` is."""
        factor, done = 1.0, step - 1
        if self.decay != "constant":
            assert self.total_steps is not None
            length = self.decay_fraction * self.total_steps
            x = limit((done - (self.total_steps - length)) / length, 0.0, 1.0)
            if self.decay == "exp" and self.final_scale:
                factor = self.final_scale**x
            else:
                factor = self.final_scale + (1 - self.final_scale) * _DECAYS[self.decay](x)
        if self.warmup_steps:
            assert self.peak_lr is not None
            warm = self.peak_lr / limit(lr, 1e-10, math.inf)
            if isinstance(step, Tensor):
                return threshold * torch.where(done < self.warmup_steps, warm, factor)
            return threshold * (warm if done < self.warmup_steps else factor)
        return threshold * factor


def _check_schedule(schedule: Any) -> None:
    if not isinstance(schedule, ClipSchedule):
        raise TypeError(f"schedule must be a ClipSchedule, got {schedule!r}")


@dataclass(frozen=True)
class SpectralClip:
    """Softly bounds the singular values of updates (SPECTRA) and, if asked, of gradients.

    Every singular value ``s`` becomes ``s / sqrt(1 + s**2 / c**2)``, which is less than ``c``; small ones
    stay as they are::

        H_c(X) = X (I + X^T X / c**2)**(-1/2)
        p = p - lr * alpha * H_post(u) - lr * weight_decay * p     alpha = sqrt(max(1, rows / columns))

    where ``u`` is the optimizer's own update without learning rate and weight decay, and the gradient is
    ``H_pre(g)``, after loss scaling and norm clipping (the paper takes the norm of clipped gradients). A
    matrix that is zero stays zero; one with a NaN becomes NaN and leaves the others alone. A vector ``v`` is
    clipped to ``v / sqrt(1 + |v|**2 / c**2)``, also where it is shorter than ``c``: the authors' code leaves
    those alone and jumps at ``c``.

    States and parameters keep their storage. Bytes moved per fp32 parameter beside the matrix products:
    28 for AdamW's moments and update, 12 to move the parameters; the workspace is shared by all.

    Args:
        post: threshold ``c`` for updates; ``None`` for none. Typical: 10.
        pre: threshold for gradients; ``None`` for none.
        schedule: how both change during the training.
        apply_to: ``"matrices"`` (two dimensions and more), ``"all"`` (vectors too), name patterns or a
            predicate of name and parameter; names come from ``AdamW(model.named_parameters())``.
        split: fused matrices, such as ``{"*.qkv_proj.*": 3}`` or ``{"*.qkv*": (2048, 512, 512)}`` rows.
        workspace_bytes: memory for the matrices that are worked on together; a larger one is alone, and the
            updates of one parameter (4 bytes per element) are there whatever this says.

    Raises:
        ValueError: thresholds that are not positive, nothing to clip.
        TypeError: a value of the wrong type.

    Example:
        >>> import torch, fused_optim
        >>> from fused_optim.spectral import SpectralClip, spectral_norm
        >>> weight = torch.nn.Parameter(torch.zeros(64, 32))
        >>> optimizer = fused_optim.AdamW([weight], lr=1.0, spectral=SpectralClip(post=2.0))
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> bool(spectral_norm(weight.detach()) < 2.0 * 2**0.5)
        True

    Source:
        Jiang, Semenov and Stich, Enhancing LLM Training via Spectral Clipping, arXiv 2603.14315.
    """

    post: float | None = 10.0
    pre: float | None = None
    schedule: ClipSchedule = field(default_factory=ClipSchedule)
    apply_to: ApplyTo = "matrices"
    split: Split = field(default_factory=dict)
    workspace_bytes: int = WORKSPACE_BYTES

    def __post_init__(self) -> None:
        for name in ("post", "pre"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{name} must be a number or None, got {value!r}")
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite, or None for no clipping")
        if self.post is None and self.pre is None:
            raise ValueError("SpectralClip(post=None, pre=None) clips nothing; leave spectral=None instead")
        _check_schedule(self.schedule)
        check_apply_to(self.apply_to)
        check_shared(self.split, self.workspace_bytes)

    def cut(self, name: str, own_name: str, param: Tensor) -> _Clip | None:
        """What becomes of a parameter's matrices; None for parameters that are left alone."""
        check_names_of(self.apply_to, name, own_name)
        if not applies(self.apply_to, own_name, param):
            return None
        rows = rows_of_parts(name, own_name, param, self.split)
        check_matrices(name, param, rows)
        return _Clip(rows, self.workspace_bytes, self.post, self.pre, self.schedule)


@dataclass(frozen=True)
class _Clip(WholeMatrices):
    """The transformations of :class:`SpectralClip` for parameters that hold the same matrices."""

    post: float | None = None
    pre: float | None = None
    schedule: ClipSchedule = field(default_factory=ClipSchedule)

    def bytes_per_element(self, param: Tensor) -> float:
        """Squares of the smaller dimension have copies, more of them than the matrices themselves."""
        rows, columns = (1, *param.shape)[-2:] if param.ndim < 4 else (len(param), math.prod(param.shape[1:]))
        return 26 + 80 * min(rows, columns) / max(rows, columns, 1)

    def reads_gradients(self) -> bool:
        return self.pre is not None

    def scalars(self, hyper: Hyper, step: Any, decay: Any) -> tuple[Any, ...]:
        return tuple(
            0.0 if threshold is None else limit(self.schedule(threshold, hyper["lr"], step), _LEAST, math.inf)
            for threshold in (self.post, self.pre)
        )

    def gradient(self, g: Tensor, scalars: Sequence[Any]) -> Tensor:
        return soft_clip(g, scalars[1])

    def update(self, u: Tensor, scalars: Sequence[Any], shared: Sequence[Tensor], p: Tensor | None) -> Tensor:
        if self.post is None:
            return u
        m, n = u.shape[-2:]
        # A vector, though its matrix has one row, is not scaled, and a tall one has no columns to speak of.
        return soft_clip(u, scalars[0]).mul_(max(1.0, m / n) ** 0.5)
