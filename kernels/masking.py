"""Masked rules: any rule whose weights lose all but a few of every group of neighbours in the same pass.

A masked rule keeps its mask as a state, one bit for a weight. With ``keeps_dense`` the weights themselves
are a state as well (``dense``), and the parameter is what remains of them, for the model to compute with.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

from .spec import Hyper, Rule, Slot

GROUPS = (2, 4, 8, 16)
"""Sizes of groups that every kernel can mask; masks of others are found outside of kernels."""

SCALARS = ("pruned_grad", "pruned_decay", "pruned_scale", "kept")
"""What a recipe (fused_optim/sparsity) says of a step, after the inner rule's own scalars.

Of a pruned weight the gradient counts if ``pruned_grad`` is not 0, ``pruned_decay`` times the weight joins
it, and ``pruned_scale`` times the weight remains (nothing, if it is 0). Then ``kept`` of each group have a
place in the next mask; 0 leaves the mask as it is.
"""

MASK, DENSE = Slot("mask", codec="mask"), Slot("dense", codec="weights")


@cache
def block_ways() -> tuple[int, ...]:
    """The 90 masks of a 4x4 block with two weights in every row and column, ascending.

    Bit ``i`` of a mask stands for place ``i``, row by row.
    """
    pairs = (0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100)
    every = (sum(row << 4 * i for i, row in enumerate(rows)) for rows in product(pairs, repeat=4))
    return tuple(sorted(n for n in every if all((n >> c & 0x1111).bit_count() == 2 for c in range(4))))


@cache
def masked(rule: Rule, group: int, keeps_dense: bool) -> Rule:
    """The masked form of a rule.

    >>> from fused_optim.kernels.rules import RULES
    >>> [slot.name for slot in masked(RULES["lion"], group=4, keeps_dense=True).slots]
    ['exp_avg', 'mask', 'dense']
    """
    assert group in (0, *GROUPS)

    def row(hyper: Hyper, step: Any) -> tuple[Any, ...]:
        return *rule.row(hyper, step), *hyper["sparsity"].row(step)

    slots = (*rule.slots, MASK, *((DENSE,) if keeps_dense else ()))
    scalars = (*rule.scalars, *SCALARS)
    return Rule(f"masked_{rule.name}", slots, scalars, row, shared=rule.shared, inner=rule, group=group)


def keeps_dense(rule: Rule) -> bool:
    """Whether a rule's weights are a state, and the parameter what its mask leaves of them."""
    return DENSE in rule.slots
