"""Muon's relatives: the same class with other defaults, and Adam on the hypersphere."""

from __future__ import annotations

from typing import Any, ClassVar, final

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adamw import AdamW
from .hypersphere import Hypersphere
from .muon import Muon
from .options import Options


@final
class NorMuon(Muon):
    """:class:`Muon` whose rows (neurons) are brought to one size: ``Muon(..., beta2=0.95)``.

    After the orthogonal matrix ``O`` of a step, for every row ``i``::

        s_i = s_i + (1 - beta2) * (mean_j(O_ij**2) - s_i)
        O_i = O_i / (sqrt(s_i) + 1e-10)
        O = O * |O before| / |O|                      (Frobenius norms)

    Takes every argument of :class:`Muon` by keyword. One more state, ``row_second_moment`` (s), fp32,
    ``[rows, 1]`` (experts: ``[stack, rows, 1]``).

    Raises:
        ValueError: ``beta2=None``, and whatever :class:`Muon` refuses.

    Example:
        >>> import torch, fused_optim
        >>> weight = torch.nn.Parameter(torch.eye(4))
        >>> optimizer = fused_optim.NorMuon([weight])
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> optimizer.state[weight]["row_second_moment"].shape
        torch.Size([4, 1])

    Source:
        Li et al., NorMuon, arXiv 2510.05491.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        beta2: float = 0.95,
        **more: Any,
    ) -> None:
        if beta2 is None:  # pyright: ignore[reportUnnecessaryComparison]
            raise ValueError("NorMuon needs beta2, such as 0.95; for none, use Muon")
        super().__init__(params, lr, weight_decay, momentum, nesterov, beta2=beta2, **more)


@final
class MuonH(Muon):
    """:class:`Muon` on hyperspheres: every matrix keeps its norm, ``Muon(..., radius="fixed")``.

    ``lr`` is the tangent of the angle by which a matrix turns, see
    :class:`fused_optim.spectral.Hypersphere`. Takes every argument of :class:`Muon` by keyword. One more
    state, ``radius``, fp32, one number per matrix (none with ``radius="current"``).

    Raises:
        ValueError: ``radius=None``, and whatever :class:`Muon` refuses.

    Example:
        >>> import torch, fused_optim
        >>> weight = torch.nn.Parameter(torch.eye(4))
        >>> optimizer = fused_optim.MuonH([weight], lr=0.1)
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> round(weight.norm().item(), 5)
        2.0

    Source:
        Rethinking Language Model Scaling under Transferable Hypersphere Optimization, arXiv 2603.28743.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Any = "you",
        *,
        radius: Any = "fixed",
        **more: Any,
    ) -> None:
        if radius is None:
            raise ValueError("MuonH needs radius='fixed' or 'current'; to let norms change, use Muon")
        super().__init__(params, lr, weight_decay, momentum, nesterov, ns_coefficients, radius=radius, **more)


@final
class AdamH(AdamW):
    """:class:`AdamW` whose matrices keep their norms: ``AdamW(..., spectral=Hypersphere())``.

    Takes every argument of :class:`AdamW`; vectors follow AdamW itself. For embeddings, which should not be
    held, give ``spectral=Hypersphere(apply_to=...)`` to :class:`AdamW`. One more state, ``radius``, fp32,
    one number per matrix.

    Example:
        >>> import torch, fused_optim
        >>> weight = torch.nn.Parameter(torch.eye(4))
        >>> optimizer = fused_optim.AdamH([weight], lr=0.1, weight_decay=0.0)
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> round(weight.norm().item(), 5)
        2.0

    Source:
        Rethinking Language Model Scaling under Transferable Hypersphere Optimization, arXiv 2603.28743.
    """

    _preset: ClassVar[Options] = {"spectral": Hypersphere()}
