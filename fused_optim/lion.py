"""Lion."""

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


class Lion(FusedOptimizer):
    """Lion: every weight moves by ``lr`` in the direction of an average's sign.

    Elementwise::

        u = sign(beta1 * m + (1 - beta1) * g)        (0 where the average is 0 or NaN)
        m = beta2 * m + (1 - beta2) * g
        p = p - lr * u - lr * weight_decay * p

    The state ``exp_avg`` (m) has the parameter's shape and is stored as ``state_codec`` says. Bytes
    per parameter: 4 for the state in fp32, 2 in bf16. A step moves 20 bytes per fp32 parameter, 14 per
    bf16 parameter with an fp32 state, 10 with a bf16 state.

    Args:
        params: tensors, named tensors or groups, as for ``torch.optim``; float32, bfloat16, float16,
            float64 or complex, of any shape and strides.
        lr: size of every step; 3 to 10 times smaller than AdamW's. A float or a one-element tensor.
        betas: the mix that moves the weights and the one that is remembered, in ``[0, 1)``.
        weight_decay: decoupled decay per step, relative to ``lr``; 3 to 10 times larger than AdamW's.
        maximize: ascend instead of descend.
        foreach: accepted for source compatibility; has no effect.
        capturable: step counts live on the device, so that a CUDA graph may capture ``step()``.
        differentiable: must be False.
        fused: accepted for source compatibility; has no effect (the step is always fused).
        **options: storage, clipping, skipping and backend, see :class:`fused_optim.options.Options`.

    Raises:
        ValueError: a value out of range, or storage that does not fit a parameter.
        TypeError: a value of the wrong type, or an unknown option.

    Example:
        >>> import torch, fused_optim
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = fused_optim.Lion([weight], lr=0.5)
        >>> weight.grad = torch.tensor([3.0, -0.1, 0.0])
        >>> optimizer.step()
        >>> weight.tolist()
        [0.5, -1.5, 3.0]

    Source:
        Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["lion"]
