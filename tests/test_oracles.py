"""The reference driver against the papers in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_optim
from tests import cases
from tests.cases import assert_same_bits
from tests.oracles.adam import adam
from tests.oracles.adamw import adamw
from tests.oracles.lion import lion
from tests.oracles.sgd import sgd

STEPS, NUMEL = 12, 400
ULPS = {torch.float32: 8, torch.float64: 12}
"""Allowed distance after 12 steps, in units in the last place of the largest value on the way there.

An element goes through about ten roundings a step; for float64 parameters the oracle rounds as often.
"""

BETAS = ({"betas": (0.5, 0.7)}, {"betas": (0.0, 0.99)}, {"betas": (0.95, 0.9999)})
CHANGING = [0.01 * (step + 1) for step in range(STEPS)]
COMMON = ({}, {"maximize": True}, {"lr": 0.3}, {"lr": CHANGING})
ADAM = (
    *COMMON,
    *BETAS,
    {"eps": 1e-3},
    {"eps": 0.0},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"amsgrad": True, "weight_decay": 0.5, "maximize": True, "lr": 0.05, "betas": (0.6, 0.8)},
)
HEAVY = {"momentum": 0.9}
SGD = (
    *COMMON,
    {"weight_decay": 0.3},
    HEAVY,
    {**HEAVY, "dampening": 0.5},
    {**HEAVY, "nesterov": True},
    {**HEAVY, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.5, "dampening": -0.5},
)
OPTIONS: dict[str, tuple[Any, Callable[..., Any], Sequence[dict[str, Any]]]] = {
    "AdamW": (fused_optim.AdamW, adamw, (*ADAM, {"weight_decay": 0.0})),
    "Adam": (fused_optim.Adam, adam, (*ADAM, {"decoupled_weight_decay": True, "weight_decay": 0.1})),
    "Lion": (fused_optim.Lion, lion, (*COMMON, *BETAS, {"weight_decay": 0.3, "lr": 0.02})),
    "SGD": (fused_optim.SGD, sgd, SGD),
}


def _id(value: Any) -> str:
    text = ",".join(f"{k}={'changing' if isinstance(v, list) else v}" for k, v in value.items())
    return text.replace(" ", "") or "default"


OPTION_CASES = [
    pytest.param(name, options, id=f"{name}-{_id(options)}")
    for name, (_, _, many) in OPTIONS.items()
    for options in many
]


def _trajectory(optimizer_class: Any, p: Tensor, grads: list[Tensor | None], options: dict[str, Any]) -> Any:
    """Our parameter and states after the same gradients, through the public class."""
    param = torch.nn.Parameter(p.clone())
    lrs = options.get("lr")
    fixed = {key: value for key, value in options.items() if not isinstance(value, list)}
    optimizer = optimizer_class([param], **fixed, backend="reference")
    for step, grad in enumerate(grads):
        if isinstance(lrs, list):
            optimizer.param_groups[0]["lr"] = lrs[step]
        param.grad = None if grad is None else grad.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]


def _assert_within(actual: Tensor, expected: np.ndarray, scale: np.ndarray, ulps: int, what: str) -> None:
    real = actual.numpy().dtype
    unit = np.spacing(np.maximum(np.abs(expected), scale).astype(real))
    distance = np.abs(actual.numpy().astype(expected.dtype) - expected) / unit
    assert np.isfinite(distance).all(), f"{what}: not finite at {np.flatnonzero(~np.isfinite(distance))[:5]}"
    assert distance.max() <= ulps, f"{what}: {distance.max():.1f} ulp at {distance.argmax()}, allowed {ulps}"


def _scales(
    history: list[dict[str, np.ndarray]], start: np.ndarray, grads: list[Any]
) -> dict[str, np.ndarray]:
    """The largest values that met in an element's sums: parameter and moves, states and gradients."""
    largest_grad = np.max([np.abs(grad) for grad in grads if grad is not None], axis=0)
    params = [start, *(values["param"] for values in history)]
    moved = np.sum([np.abs(b - a) for a, b in itertools.pairwise(params)], axis=0)
    assert moved.min() > 0
    scales = {"param": np.max(np.abs(params), axis=0) + moved}
    for key in set(history[-1]) - {"param"}:
        largest = np.max([np.abs(values[key]) for values in history if key in values], axis=0)
        scales[key] = np.maximum(largest, largest_grad**2 if key.endswith("sq") else largest_grad)
    return scales


@pytest.mark.parametrize("late", [0, 5], ids=["from_the_start", "late_gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("name", "options"), OPTION_CASES)
def test_reference_equals_the_paper(
    name: str, options: dict[str, Any], dtype: torch.dtype, late: int
) -> None:
    optimizer_class, oracle, _ = OPTIONS[name]
    p = cases.normal(NUMEL, dtype, seed=1)
    grads: list[Tensor | None] = [cases.normal(NUMEL, dtype, seed=2 + step) for step in range(STEPS)]
    grads[:late] = [None] * late
    param, state = _trajectory(optimizer_class, p, grads, options)
    start, wide = p.double().numpy(), [None if g is None else g.double().numpy() for g in grads]
    history = [oracle(start, wide[: step + 1], **options) for step in range(late, STEPS)]
    expected, scales = history[-1], _scales(history, start, wide)
    assert set(expected) - {"param"} == set(state) - {"step"}
    for key, value in expected.items():
        actual = param if key == "param" else state[key]
        _assert_within(actual, value, scales[key], ULPS[dtype], key)
    assert state["step"].item() == STEPS - late


@pytest.mark.parametrize("name", OPTIONS)
def test_oracles_know_each_option(name: str) -> None:
    """An oracle that ignores an option would agree with a kernel that ignores it."""
    _, oracle, many = OPTIONS[name]
    p = cases.normal(50, torch.float64, seed=1).numpy()
    grads = [cases.normal(50, torch.float64, seed=2 + step).numpy() for step in range(STEPS)]
    results = [oracle(p, grads, **options)["param"].tobytes() for options in many]
    assert len(set(results)) == len(many)


def _one_step(optimizer_class: Any, p: list[float], grad: list[float], **options: Any) -> tuple[Tensor, Any]:
    param = torch.nn.Parameter(torch.tensor(p))
    param.grad = torch.tensor(grad)
    optimizer = optimizer_class([param], **options, backend="reference")
    optimizer.step()
    return param.detach(), optimizer.state[param]


NAN, INF = float("nan"), float("inf")


def test_lion_stands_still_where_the_average_has_no_sign() -> None:
    param, state = _one_step(fused_optim.Lion, [1.0] * 5, [0.0, -0.0, NAN, INF, -INF], lr=0.25)
    assert param.tolist() == [1.0, 1.0, 1.0, 0.75, 1.25]
    assert_same_bits(state["exp_avg"], torch.tensor([0.0, 0.0, NAN, INF, -INF]))


@pytest.mark.parametrize("optimizer_class", [fused_optim.Adam, fused_optim.AdamW])
def test_adam_poisons_only_the_elements_that_were_poisoned(optimizer_class: Any) -> None:
    param, state = _one_step(optimizer_class, [1.0] * 5, [NAN, INF, -INF, 0.0, 1.0], lr=0.5, weight_decay=0.0)
    assert_same_bits(param, torch.tensor([NAN, NAN, NAN, 1.0, 0.5]))
    assert_same_bits(state["exp_avg_sq"][:4], torch.tensor([NAN, INF, INF, 0.0]))


def test_amsgrad_keeps_nan_as_torch_maximum_does() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = fused_optim.AdamW([param], amsgrad=True, backend="reference")
    for grad in ([1.0, NAN], [1.0, 1.0]):
        param.grad = torch.tensor(grad)
        optimizer.step()
    largest = optimizer.state[param]["max_exp_avg_sq"]
    assert largest.isnan().tolist() == param.isnan().tolist() == [False, True]


def test_adam_without_eps_divides_zero_by_zero() -> None:
    param, _ = _one_step(fused_optim.AdamW, [1.0, 1.0], [0.0, 1.0], eps=0.0)
    assert param.isnan().tolist() == [True, False]
