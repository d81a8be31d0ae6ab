"""Recipes for N:M sparsity in training: values of the option ``sparsity`` of every optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .recipe import Sparsity, Transposable, check_number, check_steps
from .scalars import limit


@dataclass(frozen=True, kw_only=True)
class OneShot(Transposable):
    """Prunes once and keeps the mask: gradients of pruned weights are ignored, the weights stay zero.

    Masks need 1/8 byte per weight; there are no dense weights beside the parameters. Masks of another
    pattern, from a loaded state or before the option changed, are found anew in the next step.

    Args:
        at: the step after which weights are pruned; 0 for the weights that the first step finds.
        transposable: 2 of 4 in rows and columns.

    Raises:
        ValueError: a pattern that keeps nothing or everything, a negative step.
        TypeError: a value of the wrong type.

    Example:
        >>> import torch, fused_optim
        >>> from fused_optim.sparsity import OneShot
        >>> layer = torch.nn.Linear(8, 8)
        >>> optimizer = fused_optim.AdamW(layer.parameters(), sparsity=OneShot())
        >>> layer(torch.ones(8)).sum().backward()
        >>> optimizer.step()
        >>> int((layer.weight == 0).sum())
        32

    Source:
        Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
    """

    at: int = 0

    keeps_dense: ClassVar[bool] = False

    def _check(self) -> None:
        check_steps("at", self.at, least=0)

    @property
    def adjusts_gradients(self) -> bool:
        """They do not count."""
        return True

    def kept(self, t: Any) -> Any:
        """All until pruning."""
        return self.m + (t >= self.at) * (self.n - self.m)

    def refreshes(self, t: Any) -> Any:
        """Once; the weights that the first step finds have masks already."""
        return t == self.at

    def pruned(self, t: Any) -> tuple[Any, Any, Any]:
        """They are as if they were not there."""
        return 0.0, 0.0, 0.0


@dataclass(frozen=True, kw_only=True)
class SRSTE(Sparsity):
    """The model sees masked weights, all weights learn, and pruned ones shrink.

    With the mask ``M`` of the weights ``w`` that a step finds, and the model's gradient ``g`` at ``M * w``,
    the rule is given ``g + decay * (1 - M) * w``. Masks follow the weights in every step, or after every
    ``every`` steps, after ``dense_steps`` without any (none in the paper).

    Dense weights are kept as state ``dense``: 4 bytes per weight in fp32, or as ``param_codec`` says; masks
    need 1/8 byte.

    Args:
        decay: strength of the pull on pruned weights, before the optimizer's own scaling.
        dense_steps: steps before the first masks.
        every: steps between new masks, 1 in the paper.

    Raises:
        ValueError: a pattern that keeps nothing or everything, a negative decay or step, ``every=0``.
        TypeError: a value of the wrong type.

    Example:
        >>> import torch, fused_optim
        >>> from fused_optim.sparsity import SRSTE
        >>> layer = torch.nn.Linear(8, 8)
        >>> optimizer = fused_optim.AdamW(layer.parameters(), sparsity=SRSTE(n=1, m=4))
        >>> layer(torch.ones(8)).sum().backward()
        >>> optimizer.step()
        >>> int((layer.weight != 0).sum()), optimizer.state[layer.weight]["dense"].shape
        (16, torch.Size([8, 8]))

    Source:
        Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch,
        arXiv 2102.04010. A dense beginning: Lu et al., STEP: Learning N:M Structured Sparsity Masks from
        Scratch with Precondition, arXiv 2302.01172 (there Adam's second moment stays as it is afterwards).
    """

    decay: float = 2e-4
    dense_steps: int = 0
    every: int = 1

    def _check(self) -> None:
        check_number("decay", self.decay)
        check_steps("dense_steps", self.dense_steps, least=0)
        check_steps("every", self.every)

    @property
    def adjusts_gradients(self) -> bool:
        """Pruned weights join them."""
        return self.decay > 0

    def kept(self, t: Any) -> Any:
        """All in the dense beginning."""
        return self.m + (t >= self.dense_steps) * (self.n - self.m)

    def refreshes(self, t: Any) -> Any:
        """From time to time, and where the dense beginning ends."""
        return ((t % self.every == 0) | (t == self.dense_steps)) * 1

    def pruned(self, t: Any) -> tuple[Any, Any, Any]:
        """They shrink."""
        return 1.0, self.decay, 0.0


@dataclass(frozen=True, kw_only=True)
class MaskedDecay(Transposable):
    """Masks that change seldom, decay of pruned weights through the gradient, and dense last steps.

    The rule is given ``g + decay * (1 - M) * w`` as in :class:`SRSTE`; masks are found anew after every
    ``every`` steps. In the last part of the training the model sees all weights (``dense_end`` of
    ``total_steps``). State as for :class:`SRSTE`.

    Args:
        total_steps: of the training.
        decay: strength of the pull on pruned weights; :func:`fused_optim.sparsity.choose_decay` finds it by
            the flip rates of short runs (:class:`fused_optim.sparsity.FlipRate`).
        every: steps between new masks.
        dense_end: the dense part at the end, in [0, 1); 0 to end with masks.
        transposable: 2 of 4 in rows and columns, so that the backward pass is sparse as well.

    Raises:
        ValueError: ``total_steps`` is missing, or a value out of range.
        TypeError: a value of the wrong type.

    Example:
        >>> from fused_optim.sparsity import MaskedDecay
        >>> recipe = MaskedDecay(total_steps=600, decay=1e-5)
        >>> [recipe.kept(t) for t in (0, 499, 500)]
        [2, 2, 4]

    Source:
        Hu et al., Accelerating Transformer Pre-training with 2:4 Sparsity, arXiv 2404.01847.
    """

    total_steps: int | None = None
    decay: float = 1e-4
    every: int = 40
    dense_end: float = 1 / 6
    transposable: bool = True

    def _check(self) -> None:
        if self.total_steps is None:
            raise ValueError("MaskedDecay needs total_steps: the length of the training")
        check_steps("total_steps", self.total_steps)
        check_steps("every", self.every)
        check_number("decay", self.decay)
        check_number("dense_end", self.dense_end)
        if self.dense_end >= 1:
            raise ValueError(f"dense_end={self.dense_end} must be in [0, 1): a part of the training")

    @property
    def _last_masked(self) -> int:
        assert self.total_steps is not None
        return self.total_steps - int(self.total_steps * self.dense_end)

    def _dense(self, t: Any) -> Any:
        return (t >= self._last_masked) * (self.dense_end > 0)

    @property
    def adjusts_gradients(self) -> bool:
        """Pruned weights join them."""
        return self.decay > 0

    def kept(self, t: Any) -> Any:
        """All at the end."""
        return self.n + self._dense(t) * (self.m - self.n)

    def refreshes(self, t: Any) -> Any:
        """From time to time, and where the dense end begins."""
        return ((t % self.every == 0) | (t == self._last_masked)) * 1

    def pruned(self, t: Any) -> tuple[Any, Any, Any]:
        """They shrink."""
        return 1.0, self.decay, 0.0


@dataclass(frozen=True, kw_only=True)
class CAST(Sparsity):
    """Pruned weights decay to nothing while the model still sees them; for :class:`fused_optim.CASTAdamS`.

    Masks follow the weights every ``every`` steps. After ``total_steps`` what is left of pruned weights is
    set to zero and they stay so. Masks need 1/8 byte per weight.

    Args:
        total_steps: of the training; the pull on pruned weights grows until then.
        every: steps between new masks.

    Raises:
        ValueError: ``total_steps`` is missing, or a value out of range.
        TypeError: a value of the wrong type.

    Example:
        >>> from fused_optim.sparsity import CAST
        >>> [CAST(total_steps=100).progress(t) for t in (1, 51, 200)]
        [0.0, 0.5, 1.0]

    Source:
        CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language
        Models, arXiv 2509.25996.
    """

    total_steps: int | None = None
    every: int = 10

    keeps_dense: ClassVar[bool] = False

    def _check(self) -> None:
        if self.total_steps is None:
            raise ValueError("CAST needs total_steps: the pull on pruned weights grows until then")
        check_steps("total_steps", self.total_steps)
        check_steps("every", self.every)

    def progress(self, t: Any) -> Any:
        """Zero in the first step, one after the last."""
        assert self.total_steps is not None
        return limit((t - 1) / self.total_steps, 0.0, 1.0)

    def kept(self, t: Any) -> Any:
        """Always the same."""
        return self.n

    def refreshes(self, t: Any) -> Any:
        """From time to time until the end."""
        assert self.total_steps is not None
        return (((t % self.every == 0) & (t < self.total_steps)) | (t == self.total_steps)) * 1

    def pruned(self, t: Any) -> tuple[Any, Any, Any]:
        """They are like all others until the end."""
        assert self.total_steps is not None
        lives = (t < self.total_steps) * 1.0
        return (t <= self.total_steps) * 1.0, 0.0, lives
