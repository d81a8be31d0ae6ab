"""The same classes with narrow states as their default: what bitsandbytes and torchao call by these names."""

from __future__ import annotations

from typing import ClassVar, final

from .adam import Adam
from .adamw import AdamW
from .lion import Lion
from .options import Options
from .sgd import SGD

_INT8: Options = {"state_codec": "int8"}
_INT4: Options = {"state_codec": "int4"}


@final
class AdamW8bit(AdamW):
    """:class:`AdamW` whose states are stored in 8 bits (``state_codec="int8"``): 2.03 bytes per parameter.

    Takes every argument of :class:`AdamW`; the formulas, shapes and errors are the same. States are
    codes of the dynamic map in blocks of 256 with an fp32 scale each, the format of bitsandbytes
    (:mod:`fused_optim.interchange` converts its checkpoints). Parameters with fewer than 4096 elements
    keep fp32 states, others as ``keep_fp32`` says. Two deviations from bitsandbytes, which are the
    default because they are safer: a positive second moment never becomes zero, and a NaN or infinity
    stays visible in its block instead of silently wiping the states of that element
    (``skip_nonfinite=True`` leaves such steps out altogether).

    Example:
        >>> import torch, fused_optim
        >>> weight = torch.nn.Parameter(torch.zeros(64, 64))
        >>> optimizer = fused_optim.AdamW8bit([weight], lr=0.1)
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].dtype
        torch.uint8

    Source:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """

    _preset: ClassVar[Options] = _INT8


@final
class Adam8bit(Adam):
    """:class:`Adam` with 8-bit states, see :class:`AdamW8bit`; its weight decay is coupled, as in torch.

    Example:
        >>> import torch, fused_optim
        >>> optimizer = fused_optim.Adam8bit([torch.nn.Parameter(torch.zeros(64, 64))])
    """

    _preset: ClassVar[Options] = _INT8


@final
class Lion8bit(Lion):
    """:class:`Lion` with an 8-bit state, see :class:`AdamW8bit`: 1.016 bytes per parameter.

    Example:
        >>> import torch, fused_optim
        >>> optimizer = fused_optim.Lion8bit([torch.nn.Parameter(torch.zeros(64, 64))])
    """

    _preset: ClassVar[Options] = _INT8


@final
class SGD8bit(SGD):
    """:class:`SGD` whose momentum takes 8 bits, see :class:`AdamW8bit`: 1.016 bytes per parameter.

    Without ``momentum``, which is 0 by default, SGD keeps no state and there is nothing to save.

    Example:
        >>> import torch, fused_optim
        >>> optimizer = fused_optim.SGD8bit([torch.nn.Parameter(torch.zeros(64, 64))], momentum=0.9)
    """

    _preset: ClassVar[Options] = _INT8


@final
class AdamW4bit(AdamW):
    """:class:`AdamW` whose states are stored in 4 bits (``state_codec="int4"``): 1.06 bytes per parameter.

    Two codes a byte, in blocks of 128 with an fp32 scale each. The first moment uses the 4-bit dynamic
    map with a signed scale, so that the largest value of a block is always exact. The second moment is
    a fourth power, ``(k / 16)**4`` for k from 1 to 16: no zero to divide by, and a range of 256 to 1 in
    its square root, where a linear code (torchao, Li et al.) has 4 to 1.

    Example:
        >>> import torch, fused_optim
        >>> optimizer = fused_optim.AdamW4bit([torch.nn.Parameter(torch.zeros(64, 64))])

    Source:
        Li et al., Memory Efficient Optimizers with 4-bit States, arXiv 2309.01507.
    """

    _preset: ClassVar[Options] = _INT4


@final
class Lion4bit(Lion):
    """:class:`Lion` with a 4-bit state, see :class:`AdamW4bit`: 0.53 bytes per parameter.

    Example:
        >>> import torch, fused_optim
        >>> optimizer = fused_optim.Lion4bit([torch.nn.Parameter(torch.zeros(64, 64))])
    """

    _preset: ClassVar[Options] = _INT4
