"""Stochastic gradient descent."""

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


class SGD(FusedOptimizer):
    """Stochastic gradient descent with momentum, Nesterov momentum and L2 decay.

    Elementwise::

        g = g + weight_decay * p
        b = momentum * b + (1 - dampening) * g       (b = g in the first step)
        p = p - lr * b                               (nesterov: p - lr * (g + momentum * b))

    The state ``momentum_buffer`` (b), kept only while ``momentum`` is not 0, has the parameter's shape and
    is stored as ``state_codec`` says; a momentum that is set later starts it from zero (torch keeps an old
    one, and starts a new one with ``g``). Bytes per parameter: 4 for the state in fp32, 2 in bf16. A step
    moves 20 bytes per fp32 parameter with momentum and 12 without.

    Args:
        params: tensors, named tensors or groups, as for ``torch.optim``; float32, bfloat16, float16,
            float64 or complex, of any shape and strides.
        lr: learning rate; a float or a one-element tensor.
        momentum: how much of the buffer is kept.
        dampening: how much of a gradient stays out of the buffer, from the second step on.
        weight_decay: strength of the L2 term.
        nesterov: look ahead along the momentum; needs a momentum above 0 and no dampening.
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
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.SGD([weight], lr=0.5, momentum=0.9)
        >>> weight.grad = torch.tensor([2.0, -4.0])
        >>> optimizer.step()
        >>> weight.tolist()
        [0.0, 0.0]

    Source:
        Sutskever et al., On the Importance of Initialization and Momentum in Deep Learning, ICML 2013,
        in the form that torch.optim.SGD gave it.
    """

    _unknown_to_torch = frozenset({"step", "capturable"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
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
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["sgd_momentum" if group["momentum"] != 0 else "sgd"]
