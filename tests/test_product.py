"""Every rule with every storage on every backend: the same bits as the reference driver."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests import cases
from tests.arena import Bed, assert_equal_beds
from tests.cases import Case, Target

REFERENCE = Target("reference", "cpu")


def _compare(
    case: Case, target: Target, sizes: Sequence[int], steps: int, seed: int, **options: bool
) -> None:
    bed, expected = Bed(case, target, sizes, seed=seed, **options), Bed(case, REFERENCE, sizes, seed=seed)
    before = expected.snapshot()
    for _ in range(steps):
        bed.step()
        expected.step()
    assert_equal_beds(bed, expected)
    bed.assert_intact()
    moved = [not torch.equal(a, b) for a, (_, b) in zip(before, expected.named(), strict=True) if a.numel()]
    assert all(moved), "a test whose reference leaves a tensor as it was proves nothing about it"


@pytest.mark.parametrize("target", [cases.NATIVE, *cases.GPU])
@pytest.mark.parametrize("case", cases.all_cases(), ids=lambda case: case.id)
def test_every_storage(case: Case, target: Target) -> None:
    _compare(case, target, cases.SIZES, steps=20, seed=1)


@pytest.mark.parametrize("target", [cases.INTERPRETER])
@pytest.mark.parametrize("case", cases.main_cases(), ids=lambda case: case.id)
def test_main_storages_through_the_interpreter(case: Case, target: Target) -> None:
    _compare(case, target, cases.SIZES, steps=20, seed=2)


@pytest.mark.parametrize("target", [cases.INTERPRETER])
@pytest.mark.parametrize("case", cases.pairwise_cases(), ids=lambda case: case.id)
def test_every_pair_of_storages_through_the_interpreter(case: Case, target: Target) -> None:
    _compare(case, target, (1, 16, 255, 4097), steps=3, seed=3)
