"""CASTAdamS: Adam whose pruned weights decay at a rate that adapts to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .kernels.rules import CAST_ADAM, RULES
from .kernels.spec import Rule
from .optimizer import FusedOptimizer
from .options import Options


class CASTAdamS(FusedOptimizer):
    """Adam for masked weights in which the momentum of pruned ones turns into an L1 decay (CAST's AdamS).

    At step ``t`` of ``T``, elementwise, with the mask ``M`` and ``alpha = (t - 1) / T``::

        m = m + (1 - beta1) * (g - m)
        x = m                                           where M = 1
        x = (1 - alpha) * m + alpha * l1 * sign(p)      where M = 0
        c = 1 / (1 - beta1**t)
        v = beta2 * v + (1 - beta2) * (c * x)**2
        p = p - lr * c * x / (sqrt(v / (1 - beta2**t)) + eps)

    The decay divided by its own root mean square shrinks pruned weights by about ``lr`` per step, whatever
    ``l1`` is; ``l1`` says from when on it outweighs the gradient. The model computes with all weights; at the
    end of ``T`` steps what is left of pruned ones is set to zero (see :class:`fused_optim.sparsity.CAST`).
    The paper adds up ``x**2`` without ``c``, so that the first step is ``1 / (1 - beta1)`` times too large;
    ``corrects_second_moment=False`` does the same. Parameters that have no masks follow AdamW.

    As ``v`` averages squares of the momentum instead of the gradient, steps are up to 4 times as long as
    AdamW's with the same ``lr`` where gradients are mostly noise. The paper starts from a trained dense
    model: so train with AdamW first, then make this optimizer for the rest of the steps.

    States ``exp_avg`` (m) and ``exp_avg_sq`` (v) have the parameter's shape and are stored as ``state_codec``
    says; ``mask`` has one bit per weight: 8.125 bytes per parameter in fp32. A step moves 28.25 bytes per
    fp32 parameter.

    Args:
        params: tensors, named tensors or groups, as for ``torch.optim``.
        lr: learning rate; a float or a one-element tensor.
        betas: decay rates of the two averages, in ``[0, 1)``.
        eps: added to the denominator, outside of the bias correction.
        weight_decay: decoupled decay per step of parameters without masks, relative to ``lr``.
        l1: strength of the decay of pruned weights, in units of the gradient.
        corrects_second_moment: whether ``v`` averages the bias-corrected momentum.
        maximize: ascend instead of descend.
        capturable: step counts live on the device, so that a CUDA graph may capture ``step()``.
        **options: storage, clipping, skipping and backend, see :class:`fused_optim.options.Options`;
            ``sparsity=CAST(total_steps=...)`` must be among them, ``spectral`` must not.

    Raises:
        ValueError: a value out of range, another recipe, or storage that does not fit a parameter.
        TypeError: a value of the wrong type, or an unknown option.

    Example:
        >>> import torch, fused_optim
        >>> from fused_optim.sparsity import CAST
        >>> layer = torch.nn.Linear(8, 4)
        >>> optimizer = fused_optim.CASTAdamS(layer.parameters(), lr=0.01, sparsity=CAST(total_steps=20))
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     layer(torch.ones(8)).square().sum().backward()
        ...     optimizer.step()
        >>> int((layer.weight == 0).sum())
        16

    Source:
        CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language
        Models, arXiv 2509.25996.
    """

    _unknown_to_torch = frozenset({"l1", "corrects_second_moment", "decoupled_weight_decay"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-5,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        l1: float = 4e-7,
        *,
        corrects_second_moment: bool = True,
        maximize: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "l1": l1,
            "corrects_second_moment": corrects_second_moment,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["adam"]

    def _masked_rule(self, group: Mapping[str, Any]) -> Rule:
        return CAST_ADAM
