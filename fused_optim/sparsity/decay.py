"""The strength of masked decay that follows from how often masks change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..recipe import check_number


def choose_decay(
    train: Callable[[float | None], float | Tensor],
    decays: Sequence[float],
    low: float = 0.6,
    high: float = 0.95,
) -> tuple[float, dict[float, float]]:
    """The weakest decay of pruned weights that calms masks as much as it should: the flip-rate rule.

    ``mu = r(decay) / r(dense)``, with the flip rate ``r`` of a short warm-up. Too weak a decay lets masks
    change more often than those of a dense model would, too strong a one freezes them; by the paper, decays
    with ``mu`` in [0.60, 0.95] are feasible. Of these the smallest is taken here, which changes the training
    least: decays are tried in ascending order until one is feasible (``mu`` need not fall steadily).

    Args:
        train: trains a fresh model with a decay, or densely if it is given None, and returns its mean flip
            rate (:class:`FlipRate`), a number or a tensor of one. All runs look at masks after the same
            steps, those that find new ones, with the data and learning rates of the training to come.
        decays: which to try, in any order.
        low: the least ratio.
        high: the largest ratio.

    Returns:
        The decay, and the ratio of each one that was tried, ascending.

    Raises:
        ValueError: no decay is feasible (all ratios are named), masks of the dense run do not change, a rate
            that is negative or not finite; before any training: no decays, or one out of range.
        TypeError: a value of the wrong type.

    Example:
        >>> import torch, fused_optim
        >>> from fused_optim.sparsity import FlipRate, MaskedDecay, choose_decay
        >>> def train(decay):
        ...     torch.manual_seed(0)
        ...     layer, x, y = torch.nn.Linear(16, 16), torch.randn(64, 16), torch.randn(64, 16)
        ...     recipe = MaskedDecay(total_steps=1000, every=5, decay=decay or 0.0)
        ...     sparsity = None if decay is None else recipe
        ...     optimizer = fused_optim.AdamW(layer.parameters(), lr=0.003, sparsity=sparsity)
        ...     flips, rates = FlipRate(optimizer, recipe), []
        ...     for step in range(1, 51):
        ...         optimizer.zero_grad()
        ...         (layer(x) - y).square().mean().backward()
        ...         optimizer.step()
        ...         if step % recipe.every == 0:
        ...             rates.append(flips.measure())
        ...     return torch.stack(rates).mean()
        >>> decay, ratios = choose_decay(train, [0.01, 0.2, 1.0])
        >>> decay, list(ratios)
        (0.2, [0.01, 0.2])

    Source:
        Hu et al., Accelerating Transformer Pre-training with 2:4 Sparsity, arXiv 2404.01847.
    """
    given: Any = decays
    if not isinstance(given, list | tuple):
        raise TypeError(f"decays must be a list of numbers, got {given!r}")
    for name, value in (("low", low), ("high", high), *((f"decays[{i}]", d) for i, d in enumerate(decays))):
        check_number(name, value)
    if not decays:
        raise ValueError("decays is empty; give some to try, such as [1e-6, 1e-5, 1e-4]")
    if low > high:
        raise ValueError(f"low={low} is above high={high}: no ratio lies between them")
    dense = _rate(train, None)
    if not dense:
        raise ValueError("masks of the dense run never change; train longer, or look after more steps")
    ratios: dict[float, float] = {}
    for decay in sorted(set(decays)):
        ratios[decay] = _rate(train, decay) / dense
        if low <= ratios[decay] <= high:
            return decay, ratios
    listed = ", ".join(f"{decay:g}: {ratio:.3f}" for decay, ratio in ratios.items())
    larger, smaller = min(ratios.values()) > high, max(ratios.values()) < low
    advice = "larger decays" if larger else "smaller decays" if smaller else "decays between these"
    raise ValueError(f"no flip rate is {low:g} to {high:g} times the dense one ({listed}); try {advice}")


def _rate(train: Callable[[float | None], Any], decay: float | None) -> float:
    value = train(decay)
    rate = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    check_number(f"the flip rate that train({decay}) returned", rate)
    return float(rate)
