"""Recipes for N:M sparsity that come into force little by little: progressive gradient flow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .recipe import Sparsity, check_number, check_steps
from .scalars import limit


@dataclass(frozen=True, kw_only=True)
class MaskDecay(Sparsity):
    """Progressive gradient flow: what the model sees of pruned weights fades away (MdGf).

    The model sees ``w * (M + (1 - M) * f)``. ``f`` is 1 for ``dense_steps``; then, ``s`` steps later,
    ``1 - s / decay_steps`` (``"linear"``) or ``exp(-coefficient * s)`` (``"exponential"``), and 0 from
    ``decay_steps`` on. Gradients are neither masked nor scaled. State as for :class:`SRSTE`.

    Args:
        decay_steps: steps until nothing is left of pruned weights.
        dense_steps: steps before that with all weights.
        kind: the shape of the decay.
        coefficient: of the exponential decay; by default it ends at one hundredth.

    Raises:
        ValueError: ``decay_steps`` is missing, or a value out of range.
        TypeError: a value of the wrong type.

    Example:
        >>> from fused_optim.sparsity import MaskDecay
        >>> recipe = MaskDecay(dense_steps=100, decay_steps=200)
        >>> [recipe.factor(t) for t in (100, 200, 300)]
        [1.0, 0.5, 0.0]

    Source:
        Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
        arXiv 2402.04744.
    """

    decay_steps: int | None = None
    dense_steps: int = 0
    kind: Literal["linear", "exponential"] = "linear"
    coefficient: float | None = None

    def _check(self) -> None:
        if self.decay_steps is None:
            raise ValueError("MaskDecay needs decay_steps: how long pruned weights fade away")
        check_steps("decay_steps", self.decay_steps)
        check_steps("dense_steps", self.dense_steps, least=0)
        if self.kind not in ("linear", "exponential"):
            raise ValueError(f"kind={self.kind!r} is unknown; allowed: linear, exponential")
        if self.coefficient is not None:
            check_number("coefficient", self.coefficient)
            if self.kind == "linear":
                raise ValueError("coefficient is for kind='exponential'; a linear decay ends at decay_steps")

    def kept(self, t: Any) -> Any:
        """Always the same."""
        return self.n

    def factor(self, t: Any) -> Any:
        """What is left of pruned weights after ``t`` steps."""
        assert self.decay_steps is not None
        s = limit(t - self.dense_steps, 0.0, float(self.decay_steps))
        if self.kind == "linear":
            return 1 - s / self.decay_steps
        coefficient = math.log(100) / self.decay_steps if self.coefficient is None else self.coefficient
        return math.e ** (-coefficient * s) * (s < self.decay_steps)

    def pruned(self, t: Any) -> tuple[Any, Any, Any]:
        """They fade away."""
        return 1.0, 0.0, self.factor(t)


@dataclass(frozen=True, kw_only=True)
class StructureDecay(Sparsity):
    """Progressive gradient flow: patterns become sparser, or coarser ones finer, step by step (SdGf).

    After ``dense_steps`` the rest of ``total_steps`` is divided into frames of equal length, one for each
    pattern. ``"stepwise"``: ``(m-1):m, m/2:m, m/4:m, ...`` down to ``n:m``. ``"geometric"``:
    ``8n:8m, 4n:4m, 2n:2m, n:m``, as far as groups have at most 32 weights. The model sees masked weights,
    all weights learn. State as for :class:`SRSTE`.

    Args:
        total_steps: of the training, in which the last pattern has its frame.
        dense_steps: steps before the first pattern.
        kind: which patterns. ``"geometric"`` needs step counts that the host knows: on a GPU no
            ``capturable``, ``skip_nonfinite`` and loss scaler.

    Raises:
        ValueError: ``total_steps`` is missing, or a value out of range.
        TypeError: a value of the wrong type.

    Example:
        >>> from fused_optim.sparsity import StructureDecay
        >>> StructureDecay(n=1, m=8, total_steps=900).patterns
        ((7, 8), (4, 8), (2, 8), (1, 8))
        >>> StructureDecay(total_steps=900, kind="geometric").patterns
        ((16, 32), (8, 16), (4, 8), (2, 4))

    Source:
        Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
        arXiv 2402.04744.
    """

    total_steps: int | None = None
    dense_steps: int = 0
    kind: Literal["stepwise", "geometric"] = "stepwise"

    def _check(self) -> None:
        if self.total_steps is None:
            raise ValueError("StructureDecay needs total_steps: the length of the training")
        check_steps("total_steps", self.total_steps)
        check_steps("dense_steps", self.dense_steps, least=0)
        if self.kind not in ("stepwise", "geometric"):
            raise ValueError(f"kind={self.kind!r} is unknown; allowed: stepwise, geometric")
        if self.total_steps - self.dense_steps < len(self.patterns):
            raise ValueError(
                f"total_steps={self.total_steps} leaves less than a step for each of {len(self.patterns)} "
                f"patterns after dense_steps={self.dense_steps}"
            )

    @property
    def patterns(self) -> tuple[tuple[int, int], ...]:
        """Weights kept of how many, frame by frame."""
        if self.kind == "geometric":
            return tuple((self.n * c, self.m * c) for c in (8, 4, 2, 1) if self.m * c <= self.largest_group)
        halves = [self.m >> i for i in range(1, self.m.bit_length())]
        kept = [self.m - 1, *(half for half in halves if self.n < half < self.m - 1), self.n]
        return tuple((k, self.m) for k in dict.fromkeys(kept))

    @property
    def largest_group(self) -> int:
        """The first of a geometric sequence."""
        if self.kind == "stepwise":
            return self.m
        return max(self.m * c for c in (1, 2, 4, 8) if self.m * c <= 32)

    @property
    def changes_groups(self) -> bool:
        """Whether the host must know how many steps are done."""
        return self.kind == "geometric"

    def _starts(self) -> list[float]:
        assert self.total_steps is not None
        length = (self.total_steps - self.dense_steps) / len(self.patterns)
        return [self.dense_steps + length * i for i in range(len(self.patterns))]

    def group(self, t: float) -> int:
        """Of the pattern after ``t`` steps."""
        begun = [m for start, (_, m) in zip(self._starts(), self.patterns, strict=True) if t >= start]
        return begun[-1] if begun else self.largest_group

    def kept(self, t: Any) -> Any:
        """Of the pattern after ``t`` steps; all before the first."""
        kept: Any = self.largest_group
        before = self.largest_group
        for start, (n, _) in zip(self._starts(), self.patterns, strict=True):
            kept, before = kept + (t >= start) * (n - before), n
        return kept
