"""Adam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .kernels.rules import RULES
from .kernels.spec import Rule
from .optimizer import FusedOptimizer
from .options import Options


class Adam(FusedOptimizer):
    """Adam, with weight decay as an L2 term in the gradient, or decoupled on request.

    At step ``t``, elementwise::

        g = g + weight_decay * p
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g**2
        p = p - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    With ``amsgrad`` the largest ``v`` so far takes the place of ``v`` in the last line. With
    ``decoupled_weight_decay`` the first line is left out and the weights shrink by
    ``lr * weight_decay`` of their value, as in :class:`fused_optim.AdamW`, whose notes on states,
    storage and bytes per parameter hold here too.

    Args:
        params: tensors, named tensors or groups, as for ``torch.optim``; float32, bfloat16, float16,
            float64 or complex, of any shape and strides.
        lr: learning rate; a float or a one-element tensor.
        betas: decay rates of the two averages, in ``[0, 1)``; floats or one-element tensors.
        eps: added to the denominator, outside of the bias correction.
        weight_decay: strength of the L2 term.
        amsgrad: keep the maximum of the second moment (state ``max_exp_avg_sq``).
        maximize: ascend instead of descend.
        foreach: accepted for source compatibility; has no effect.
        capturable: step counts live on the device, so that a CUDA graph may capture ``step()``.
        differentiable: must be False.
        fused: accepted for source compatibility; has no effect (the step is always fused).
        decoupled_weight_decay: decay the weights instead of adding to the gradient.
        **options: storage, clipping, skipping and backend, see :class:`fused_optim.options.Options`.

    Raises:
        ValueError: a value out of range, or storage that does not fit a parameter.
        TypeError: a value of the wrong type, or an unknown option.

    Example:
        >>> import torch, fused_optim
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.Adam([weight], lr=0.5)
        >>> weight.grad = torch.tensor([3.0, -0.1])
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.5, -1.5]

    Source:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, arXiv 1412.6980.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["adam_amsgrad" if group["amsgrad"] else "adam"]
