"""Functions of the singular values of matrices, in batches: orthogonalise, clip, invert, measure.

Every function takes ``[..., m, n]`` in float32, bfloat16, float16 or float64 and treats each matrix on its
own: one that holds a NaN or an infinity becomes NaN, a zero matrix stays zero, and the others are, but for
rounding, as if they had been given alone. The same call gives the same bits again on one machine. Nothing
waits for a GPU. Not differentiable: results never require gradients, also where X does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Literal, ParamSpec

import torch
from torch import Tensor

from .kernels.spectral import clip, newton_schulz, norm
from .kernels.spectral.coefficients import schedule
from .kernels.spectral.matrices import (
    check,
    check_bound,
    check_count,
    check_number,
    frobenius,
    reciprocal,
    restore,
    wide,
)
from .kernels.spectral.products import one_by_one

__all__ = ["hard_clip", "inverse_sqrt", "orthogonalize", "soft_clip", "spectral_norm"]

Given = ParamSpec("Given")

_FORMS = ("auto", "standard", "gram")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _as_it_says(function: Callable[Given, Tensor]) -> Callable[Given, Tensor]:
    """Without gradients, and in the dtypes that a function chooses: autocast would take its own."""

    @wraps(function)
    def wrapper(*args: Given.args, **kwargs: Given.kwargs) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for device_type in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                stack.enter_context(torch.autocast(device_type, enabled=False))
            return function(*args, **kwargs)

    return wrapper


@_as_it_says
def orthogonalize(
    X: Tensor,
    coefficients: str | Sequence[Sequence[float]] = "polar_express",
    steps: int = 5,
    *,
    form: Literal["auto", "standard", "gram"] = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Moves every singular value towards one: ``U Vᵀ`` of ``X = U Σ Vᵀ``, by Newton–Schulz iterations.

    With X wide (a tall matrix is transposed) and divided by its Frobenius norm, at step i::

        A = X Xᵀ;   X = a_i X + (b_i A + c_i A²) X

    ``form="gram"`` computes the same iterates as ``Q X`` from the m × m matrices R and Q::

        Z = b R + c R²;   Q = a Q + Q Z;   R = (a I + Z) R (a I + Z)

    and forms R anew from X after every second step (after the first two every third in float16 and float32,
    every fourth in float64), because R holds squares. For n = 4 m and five steps in bfloat16 that is 0.78 of
    the operations; the error is up to 1.25 times that of the standard form where the spectrum is narrow and
    smaller where it is wide. ``"auto"`` takes the form with fewer operations on the device, from 256 rows on.

    After five steps singular values above 0.01 of the norm lie in [0.68, 1.20] with Jordan's coefficients;
    above 0.001 of it in [0.84, 1.12] with Polar Express. Eight steps of Polar Express in float32 leave them
    within 0.001 of one.

    Args:
        X: matrices, ``[..., m, n]``.
        coefficients: ``"polar_express"``, ``"jordan"`` (torch.optim.Muon's), ``"you"``, ``"cubic"``, or a
            sequence of ``(a, b, c)``, at most one for each step; the last one is repeated if there are more
            steps.
        steps: number of steps, at least 1.
        form: ``"standard"``, ``"gram"`` or ``"auto"``.
        dtype: dtype of the products; None for bfloat16.

    Returns:
        A tensor of X's shape and dtype; that of tall matrices may be a transposed view. Singular values
        that are zero stay zero but for the products' rounding, which grows like any other value: in bfloat16
        directions that a matrix lacks may reach 0.7 in five steps, in float32 0.001.

    Raises:
        TypeError: X is not a real floating-point tensor, or another argument has a wrong type.
        ValueError: X has fewer than two dimensions, or another argument an unknown value.

    Example:
        >>> import torch
        >>> from fused_optim.spectral import orthogonalize
        >>> X = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> O = orthogonalize(X, "polar_express", steps=8, dtype=torch.float32)
        >>> bool(torch.dist(O, torch.eye(2, 3)) < 1e-3)
        True

    Source:
        Jordan et al., Muon, kellerjordan.github.io/posts/muon; Amsel et al., The Polar Express,
        arXiv 2505.16932; the Gram form: github.com/Dao-AILab/gram-newton-schulz.
    """
    check(X)
    plan = schedule(coefficients, steps)
    if form not in _FORMS:
        raise ValueError(f"form: got {form!r}; give one of {', '.join(map(repr, _FORMS))}")
    work = torch.bfloat16 if dtype is None else dtype
    if work not in _DTYPES:
        raise ValueError(f"dtype: got {dtype}; give None or one of {', '.join(map(str, _DTYPES))}")
    if not X.numel():
        return X.clone()
    Y, tall = wide(X)

    def scaled_and_iterated(Y: Tensor) -> Tensor:
        scale = reciprocal(frobenius(Y) * plan.margin, torch.promote_types(Y.dtype, torch.float32))
        return newton_schulz.orthogonalize((Y * scale).to(work), plan.steps, form)

    if len(Y) == 1 or not one_by_one(Y.shape[-2], work, Y.device.type):
        return restore(scaled_and_iterated(Y), X, tall)
    results = torch.empty(Y.shape, dtype=X.dtype, device=Y.device)
    for target, matrix in zip(results.split(1), Y.split(1), strict=True):
        target.copy_(scaled_and_iterated(matrix))
    return restore(results, X, tall)


@_as_it_says
def soft_clip(
    X: Tensor, c: float | Tensor, *, tolerance: float | None = None, max_ratio: float = 1e4
) -> Tensor:
    """Bounds every singular value smoothly: ``σ`` becomes ``σ / sqrt(1 + σ²/c²)``, which is below c.

    ::

        H = (I + X Xᵀ/c²)^(-1/2) X

    On a CPU the work follows from each matrix's own ``ratio``, its spectral norm over c, or rather a bound on
    it that holds for every matrix. Large ratios are
    brought down by rational steps of one inverse each, Zolotarev's best for the interval: one leaves 2.8 of
    300, two 1.1 of 10 000; the first is in float64 where squares of the ratio ask for it. The rest is a sum
    of inverses, or a polynomial, of as few terms as the tolerance allows, whichever takes less time. Up to 32
    rows, and up to 96 of one or two matrices, it is the eigenvalues in float64, whatever the tolerance. On
    other devices it is the upper block of the polar factor of ``[X/c; I]``, by the best quintic polynomials,
    Gram matrices formed anew before squares lose accuracy, with steps enough for ``max_ratio`` and
    coefficients looked up on the device from a bound on the ratio. On a CPU large bfloat16 matrices are
    multiplied in bfloat16, twice, where that takes less time than float32.

    Args:
        X: matrices, ``[..., m, n]``.
        c: the bound, positive: a number, or a tensor that broadcasts to ``X.shape[:-2]``, one bound a matrix.
            The values of a tensor are not looked at; ``math.inf`` clips nothing.
        tolerance: largest relative error of a singular value, besides rounding; None for 3e-5 in float32,
            1e-9 in float64, 1.2e-2 in bfloat16 and 5e-4 in float16.
        max_ratio: largest ratio for which the tolerance is promised on devices other than a CPU, at least 1;
            in float32 300 takes 7 steps instead of 9, 30 takes 5.

    Returns:
        A tensor of X's shape and dtype; that of tall matrices may be a transposed view.

    Raises:
        TypeError: X is not a real floating-point tensor, or c is no number.
        ValueError: X has fewer than two dimensions, or a number is not positive.

    Example:
        >>> import torch
        >>> from fused_optim.spectral import soft_clip
        >>> H = soft_clip(torch.diag(torch.tensor([3.0, 0.1, 0.0])), 1.0)
        >>> bool(torch.dist(H.diagonal(), torch.tensor([0.948683, 0.099504, 0.0])) < 1e-4)
        True

    Source:
        Jiang, Semenov and Stich, Enhancing LLM Training via Spectral Clipping, arXiv 2603.14315; sums of
        inverses: Hale, Higham and Trefethen, SIAM J. Numer. Anal. 46 (2008); polynomials: arXiv 2505.16932.
    """
    check(X)
    check_bound(c, X)
    if tolerance is not None:
        check_number("tolerance", tolerance, 0, "a positive number, or None")
    check_number("max_ratio", max_ratio, 1, "a number above 1")
    if not X.numel():
        return X.clone()
    return clip.soft_clip(X, c, tolerance, max_ratio)


@_as_it_says
def hard_clip(X: Tensor, c: float | Tensor) -> Tensor:
    """Bounds every singular value: ``σ`` becomes ``min(σ, c)``; smaller ones are kept as they are.

    On a CPU by the eigenvalues of the Gram matrix in float64. On other devices by two polar factors::

        O = polar(X);   D = c I - X Oᵀ;   H = (c O + X - D polar(D) O) / 2

    with an absolute error of about 1e-4 of the spectral norm.

    Args:
        X: matrices, ``[..., m, n]``.
        c: the bound, positive: a number, or a tensor that broadcasts to ``X.shape[:-2]``.

    Returns:
        A tensor of X's shape and dtype; that of tall matrices may be a transposed view.

    Raises:
        TypeError: X is not a real floating-point tensor, or c is no number.
        ValueError: X has fewer than two dimensions, or c is not positive.

    Example:
        >>> import torch
        >>> from fused_optim.spectral import hard_clip
        >>> H = hard_clip(torch.diag(torch.tensor([3.0, 0.5])), 1.0)
        >>> bool(torch.dist(H, torch.diag(torch.tensor([1.0, 0.5]))) < 1e-4)
        True

    Source:
        Cesista, Muon and spectral hard caps, leloykun.github.io/ponder/spectral-clipping (2025).
    """
    check(X)
    check_bound(c, X)
    return clip.hard_clip(X, c) if X.numel() else X.clone()


@_as_it_says
def inverse_sqrt(A: Tensor, *, ridge: float | None = None) -> Tensor:
    """The inverse square root of symmetric positive semidefinite matrices, ``(A + ridge ‖A‖ I)^(-1/2)``.

    ``‖A‖`` is the Frobenius norm, so that the result of ``s A`` is that of A over ``sqrt(s)``. On a CPU by
    eigenvalues in float64, negative ones taken as zero; on other devices by Newton–Schulz iterations in
    float32, whose relative error grows to about ``1e-7/ridge`` for eigenvalues near zero.

    Args:
        A: symmetric matrices, ``[..., n, n]``; only their symmetric part counts.
        ridge: what is added to the eigenvalues, relative to the norm; positive; None for the machine epsilon
            of A's dtype.

    Returns:
        A tensor of A's shape and dtype; zero for a zero matrix.

    Raises:
        TypeError: A is not a real floating-point tensor.
        ValueError: A is not square, or the ridge is not positive.

    Example:
        >>> import torch
        >>> from fused_optim.spectral import inverse_sqrt
        >>> Q = inverse_sqrt(torch.tensor([[4.0, 0.0], [0.0, 0.25]]))
        >>> bool(torch.dist(Q, torch.diag(torch.tensor([0.5, 2.0]))) < 1e-4)
        True

    Source:
        Higham, Functions of Matrices, SIAM (2008), chapter 6; Gupta, Koren and Singer, Shampoo,
        arXiv 1802.09568, for its use.
    """
    check(A, "A", square=True)
    if ridge is not None:
        check_number("ridge", ridge, 0, "a positive number, or None")
    return clip.inverse_sqrt(A, ridge) if A.numel() else A.clone()


@_as_it_says
def spectral_norm(X: Tensor, *, steps: int = 16, upper: bool = False) -> Tensor:
    """The largest singular value of every matrix, estimated from below or bounded from above.

    By default the largest singular value of the bidiagonal matrix after ``steps`` Golub–Kahan–Lanczos steps
    from a fixed start, each of which reads X twice: never above the norm but for rounding, and for random
    matrices within 1 % of it (exact if ``steps`` reaches the smaller dimension). It is too low where the
    start has next to no share in the largest singular vector. With ``upper=True`` a bound for every matrix,
    from three products::

        ‖X‖ ≤ (tr (X Xᵀ)^8)^(1/16)

    which is at most ``rank^(1/16)`` times the norm: 1.54 at rank 1024.

    Args:
        X: matrices, ``[..., m, n]``.
        steps: Lanczos steps, at least 1; without effect on the bound.
        upper: give the bound instead of the estimate.

    Returns:
        A tensor of shape ``X.shape[:-2]`` and X's dtype.

    Raises:
        TypeError: X is not a real floating-point tensor, or steps is no integer.
        ValueError: X has fewer than two dimensions, or steps is below 1.

    Example:
        >>> import torch
        >>> from fused_optim.spectral import spectral_norm
        >>> X = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(spectral_norm(X).item(), 4), round(spectral_norm(X, upper=True).item(), 4)
        (3.0, 3.0)

    Source:
        Golub and Kahan, SIAM J. Numer. Anal. 2 (1965); the bound: Schatten norms.
    """
    check(X)
    check_count("steps", steps)
    return norm.spectral_norm(X, steps, upper) if X.numel() else X.new_zeros(X.shape[:-2])
