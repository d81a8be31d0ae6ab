"""The flip-rate rule: which decay it takes, by rates that are given and by those of a training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fused_optim import AdamW
from fused_optim.sparsity import FlipRate, MaskedDecay, choose_decay
from tests.test_flips import Mask, groups_of, values

RATES = {None: 0.5, 0.0: 1.0, 1e-6: 0.6, 1e-5: 0.45, 1e-4: 0.5, 1e-3: 0.3, 1e-2: 0.1}


@pytest.mark.parametrize(
    ("decays", "limits", "decay", "ratios"),
    [
        ([1e-3, 1e-5, 0.0, 1e-6], {}, 1e-5, {0.0: 2.0, 1e-6: 1.2, 1e-5: 0.9}),
        ((1e-3, 1e-2, 1e-4), {}, 1e-3, {1e-4: 1.0, 1e-3: 0.6}),
        ([1e-2, 1e-2], {"low": 0.2, "high": 0.2}, 1e-2, {1e-2: 0.2}),
        ([1e-2, 0.0], {"low": 1.5, "high": 3}, 0.0, {0.0: 2.0}),
    ],
)
def test_the_smallest_feasible_decay_is_chosen(
    decays: Any, limits: dict[str, Any], decay: float, ratios: dict[float, float]
) -> None:
    asked: list[float | None] = []

    def train(decay: float | None) -> Tensor | float:
        asked.append(decay)
        return torch.tensor(RATES[decay], dtype=torch.float64) if decay else RATES[decay]

    found = choose_decay(train, decays, **limits)
    assert found == (decay, ratios) and list(found[1]) == sorted(ratios)
    assert asked == [None, *ratios]


@pytest.mark.parametrize(
    ("decays", "message"),
    [
        ([0.0, 1e-6], r"0.6 to 0.95 times the dense one \(0: 2.000, 1e-06: 1.200\); try larger decays"),
        ([1e-2], r"\(0.01: 0.200\); try smaller decays"),
        ([1e-6, 1e-2], r"\(1e-06: 1.200, 0.01: 0.200\); try decays between these"),
    ],
)
def test_no_feasible_decay(decays: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_decay(RATES.__getitem__, decays)


def _never(decay: float | None) -> float:
    raise AssertionError("nothing is trained for wrong arguments")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((_never, []), ValueError, "decays is empty"),
        ((_never, 1e-4), TypeError, "decays must be a list of numbers, got 0.0001"),
        ((_never, ["1e-4"]), TypeError, r"decays\[0\] must be a number"),
        ((_never, [1e-4, -1.0]), ValueError, r"decays\[1\]=-1.0 must be finite and not negative"),
        ((_never, [1e-4], -1.0), ValueError, "low=-1.0"),
        ((_never, [1e-4], 0.6, "1"), TypeError, "high must be a number"),
        ((_never, [1e-4], 0.9, 0.6), ValueError, "low=0.9 is above high=0.6"),
        ((lambda decay: 0.0, [1e-4]), ValueError, "masks of the dense run never change"),
        ((lambda decay: None, [1e-4]), TypeError, r"that train\(None\) returned must be a number"),
        ((lambda decay: torch.ones(2), [1e-4]), TypeError, r"that train\(None\) returned must be a number"),
        (
            (lambda decay: float("nan") if decay else 1.0, [1e-4]),
            ValueError,
            r"that train\(0.0001\) returned=nan must be finite",
        ),
    ],
)
def test_wrong_arguments_of_the_rule(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_decay(*arguments)


def _warm_up(decay: float | None) -> Iterator[tuple[float, Mask]]:
    """Flip rates of a small training, and its masks by definition."""
    torch.manual_seed(0)
    find = groups_of(2, 4, 1)
    layer, x, y = nn.Linear(16, 16, bias=False), torch.randn(64, 16), torch.randn(64, 16)
    recipe = MaskedDecay(total_steps=1000, every=2, decay=decay or 0.0, transposable=False)
    optimizer = AdamW(layer.parameters(), lr=0.003, sparsity=None if decay is None else recipe)
    flips = FlipRate(optimizer, recipe)
    yield 0.0, find(values(optimizer, layer.weight))
    for t in range(1, 21):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        if t % 2 == 0:
            yield flips.measure().item(), find(values(optimizer, layer.weight))


@pytest.mark.usefixtures("one_thread")
def test_the_rule_on_a_training() -> None:
    decays = [0.01, 0.1, 0.3, 1.0]
    expected = {}
    for decay in (None, *decays):
        masks = [mask for _, mask in _warm_up(decay)]
        expected[decay] = np.mean([(a != b).mean() for a, b in pairwise(masks)])
    ratios = {decay: expected[decay] / expected[None] for decay in decays}
    assert len(set(ratios.values())) == 4
    for decay in decays:
        close = {"low": ratios[decay] * (1 - 1e-9), "high": ratios[decay] * (1 + 1e-9)}
        found, tried = choose_decay(
            lambda d: np.mean([r for r, _ in _warm_up(d)][1:]).item(), decays, **close
        )
        assert found == decay and tried == pytest.approx({d: ratios[d] for d in decays if d <= decay})
