"""AdamW: Adam with decoupled weight decay."""

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


class AdamW(FusedOptimizer):
    """Adam whose weight decay shrinks the weights directly instead of joining the gradient.

    At step ``t``, elementwise::

        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g**2
        p = p - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps) - lr * weight_decay * p

    With ``amsgrad`` the largest ``v`` so far takes the place of ``v`` in the last line.

    States ``exp_avg`` (m) and ``exp_avg_sq`` (v) have the parameter's shape and are stored as
    ``state_codec`` says: fp32 by default, also for bfloat16 and float16 parameters. Bytes per
    parameter: 8 for states in fp32, 4 in bf16 (``amsgrad``: 12 and 6). A step moves 28 bytes per fp32
    parameter, 22 per bf16 parameter with fp32 states, 14 with bf16 states.

    Args:
        params: tensors, named tensors or groups, as for ``torch.optim``; float32, bfloat16, float16,
            float64 or complex, of any shape and strides.
        lr: learning rate; a float or a one-element tensor.
        betas: decay rates of the two averages, in ``[0, 1)``; floats or one-element tensors.
        eps: added to the denominator, outside of the bias correction.
        weight_decay: decoupled decay per step, relative to ``lr``.
        amsgrad: keep the maximum of the second moment (state ``max_exp_avg_sq``).
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
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = fused_optim.AdamW(model.parameters(), lr=0.1, clip_grad_norm=1.0)
        >>> loss = model(torch.ones(2, 4)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> bool(model(torch.ones(2, 4)).square().mean() < loss)
        True

    Source:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101; amsgrad: Reddi
        et al., On the Convergence of Adam and Beyond, arXiv 1904.09237.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["adam_amsgrad" if group["amsgrad"] else "adam"]
