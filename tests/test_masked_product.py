"""Masked rules with every storage on every backend: the same bits as the reference driver."""

from __future__ import annotations

import pytest

from tests import cases
from tests.cases import Case, Target
from tests.test_product import _compare

TAILS = (0, 1, 15, 16, 17, 255, 257, 4097)


def _moving(case: Case) -> float:
    """Masks that are only read stay as they are."""
    return 0.8 if case.rule.group else 0.6


@pytest.mark.parametrize("target", [cases.NATIVE, *cases.GPU])
@pytest.mark.parametrize("case", cases.masked_cases(), ids=lambda case: case.id)
def test_every_masked_rule(case: Case, target: Target) -> None:
    _compare(case, target, TAILS, steps=3, seed=11, moving=_moving(case))


@pytest.mark.parametrize("target", [cases.INTERPRETER])
@pytest.mark.parametrize("case", cases.masked_cases(groups=(0, 4)), ids=lambda case: case.id)
def test_masked_rules_through_the_interpreter(case: Case, target: Target) -> None:
    _compare(case, target, (0, 1, 17, 2049), steps=2, seed=12, moving=_moving(case))
