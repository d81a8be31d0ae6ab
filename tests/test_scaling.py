"""Loss scaling, clipping by global norm and skipping, alone and together: one pass, one decision for all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import FusedOptimizer
from tests import cases
from tests.cases import Target, assert_same_bits, normal

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fused_optim.AdamW, {"lr": 0.1}),
    "AdamW-amsgrad": (fused_optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "Lion": (fused_optim.Lion, {"lr": 0.1}),
    "SGD": (fused_optim.SGD, {"lr": 0.1}),
    "SGD-momentum": (fused_optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
}
SHAPES = ((3, 5), (257,), (), (0,))
NAN, INF = float("nan"), float("inf")


def _params(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(normal(shape, dtype, seed).to(device)) for seed, shape in enumerate(SHAPES)]


def _gradients(step: int, factor: float = 1.0) -> list[Tensor]:
    return [normal(shape, torch.float32, 10 * step + seed) * factor for seed, shape in enumerate(SHAPES)]


def _set(params: list[Parameter], gradients: list[Tensor]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.to(param.device, param.dtype)


def _frozen(optimizer: FusedOptimizer, params: list[Parameter]) -> list[Tensor]:
    """Copies of all parameters and states, step counts among them."""
    states = [v for p in params for v in optimizer.state.get(p, {}).values()]
    return [t.detach().clone() for t in [*params, *states]]


def _assert_unchanged(optimizer: FusedOptimizer, params: list[Parameter], before: list[Tensor]) -> None:
    for new, old in zip(_frozen(optimizer, params), before, strict=True):
        assert_same_bits(new, old)


def _assert_same(
    a: FusedOptimizer, a_params: list[Parameter], b: FusedOptimizer, b_params: list[Parameter]
) -> None:
    for new, old in zip(_frozen(a, a_params), _frozen(b, b_params), strict=True):
        assert_same_bits(new, old)


def _pair(
    name: str,
    target: Target,
    dtype: torch.dtype = torch.float32,
    both: dict[str, Any] | None = None,
    **own: Any,
) -> tuple[FusedOptimizer, list[Parameter], FusedOptimizer, list[Parameter]]:
    """An optimizer with options of its own and one without to compare with, each with its parameters."""
    optimizer_class, options = CLASSES[name]
    options = {**options, "backend": target.backend, "arithmetic": "exact", **(both or {})}
    params, plain_params = _params(target.device, dtype), _params(target.device, dtype)
    return (
        optimizer_class(params, **options, **own),
        params,
        optimizer_class(plain_params, **options),
        plain_params,
    )


def _scaler(device: str = "cpu", scale: float = 1024.0, interval: int = 3) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=scale, growth_interval=interval)


def _scaled_step(
    scaler: torch.amp.GradScaler, optimizer: Any, params: list[Parameter], step: int, **bad: float
) -> None:
    """A step as a training loop takes it; the gradients come from a backward pass of the scaled loss."""
    gradients = [g.to(p.device, p.dtype) for g, p in zip(_gradients(step), params, strict=True)]
    for param in params:
        param.grad = None
    scaler.scale(sum((p * g).sum() for p, g in zip(params, gradients, strict=True))).backward()
    for value in bad.values():
        params[1].grad.view(-1)[100] = value
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", [cases.REFERENCE, *cases.TARGETS])
def test_grad_scaler(name: str, target: Target) -> None:
    """Scales are powers of two, so that a scaled run has the bits of an unscaled one."""
    optimizer, params, plain, plain_params = _pair(name, target)
    scaler = _scaler(target.device)
    scales = []
    for step in range(8):
        infinite = step in (2, 6)
        before = _frozen(optimizer, params)
        _scaled_step(
            scaler, optimizer, params, step, **({"bad": INF if step == 2 else NAN} if infinite else {})
        )
        scales.append(scaler.get_scale())
        if infinite:
            _assert_unchanged(optimizer, params, before)
            continue
        _set(plain_params, _gradients(step))
        plain.step()
        _assert_same(optimizer, params, plain, plain_params)
    assert scales == [1024, 1024, 512, 512, 512, 1024, 512, 512], "halved where skipped, doubled after three"
    assert optimizer.skipped_steps == 2
    assert optimizer.state[params[0]]["step"].item() == 6
    assert not hasattr(optimizer, "__dict__") or "found_inf" not in vars(optimizer)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", [cases.NATIVE, *cases.GPU])
def test_the_first_step_is_skipped(name: str, target: Target) -> None:
    """torch's fused SGD leaves its momentum uninitialised memory then (LibreYOLO PR 771)."""
    optimizer, params, plain, plain_params = _pair(name, target)
    scaler, before = _scaler(target.device), [p.detach().clone() for p in params]
    for _ in range(2):
        _scaled_step(scaler, optimizer, params, 0, bad=INF)
    for param, old in zip(params, before, strict=True):
        assert_same_bits(param, old)
        for key, value in optimizer.state[param].items():
            assert not value.any(), f"{key} is not zero"
    for step in range(3):
        _scaled_step(scaler, optimizer, params, step)
        _set(plain_params, _gradients(step))
        plain.step()
    _assert_same(optimizer, params, plain, plain_params)


def test_unscaled_gradients_are_not_unscaled_again() -> None:
    """After ``scaler.unscale_`` (to look at or clip the gradients) only ``found_inf`` is left to read."""
    params, plain_params = _params(), _params()
    optimizer, plain = (fused_optim.AdamW(p, lr=0.1, backend="native") for p in (params, plain_params))
    scaler = _scaler()
    for step in range(3):
        _set(params, [gradient * scaler.get_scale() for gradient in _gradients(step)])
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        if step == 1:
            params[1].grad[3] = 1.0
        before = _frozen(optimizer, params)
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(a, b) for a, b in zip(before, _frozen(optimizer, params), strict=True))
        gradients = _gradients(step)
        if step == 1:
            gradients[1][3] = 1.0
        _set(plain_params, gradients)
        plain.step()
    _assert_same(optimizer, params, plain, plain_params)


def test_scaling_leaves_the_gradients_alone() -> None:
    params = _params()
    optimizer = fused_optim.AdamW(params, clip_grad_norm=0.1, skip_nonfinite=True)
    scaler = _scaler()
    gradients = [gradient * 1024.0 for gradient in _gradients(0)]
    _set(params, gradients)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    for param, gradient in zip(params, gradients, strict=True):
        assert_same_bits(param.grad, gradient)


def test_a_scale_that_is_no_power_of_two() -> None:
    params, plain_params = _params(), _params()
    optimizer, plain = (fused_optim.SGD(p, lr=0.1) for p in (params, plain_params))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(3000.0), torch.tensor(0.0)
    _set(params, [gradient * 3000.0 for gradient in _gradients(0)])
    _set(plain_params, _gradients(0))
    optimizer.step()
    plain.step()
    for param, other in zip(params, plain_params, strict=True):
        torch.testing.assert_close(param, other, rtol=3e-7, atol=3e-7)


def test_found_inf_alone_skips() -> None:
    params = _params()
    optimizer = fused_optim.AdamW(params)
    _set(params, _gradients(0))
    optimizer.step()
    before = _frozen(optimizer, params)
    optimizer.found_inf = torch.tensor([1.0])
    optimizer.step()
    _assert_unchanged(optimizer, params, before)
    assert optimizer.skipped_steps == 1
    optimizer.found_inf = torch.tensor([0.0])
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 2


CLIP = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-8, "atol": 2**-8}}
"""torch multiplies the stored gradient: one rounding of it more than ours, to its own dtype."""


@pytest.mark.parametrize("dtype", CLIP, ids=["fp32", "bf16"])
@pytest.mark.parametrize("max_norm", [0.0, 0.01, 1.0, 1e6])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "SGD-momentum"])
@pytest.mark.parametrize("target", [cases.REFERENCE, *cases.TARGETS])
def test_clipping_equals_torch_s(name: str, max_norm: float, dtype: torch.dtype, target: Target) -> None:
    optimizer, params, plain, plain_params = _pair(name, target, dtype, clip_grad_norm=max_norm)
    for step in range(3):
        _set(params, _gradients(step))
        _set(plain_params, _gradients(step))
        total = torch.nn.utils.clip_grad_norm_(plain_params, max_norm)
        assert (total > max_norm) == (max_norm <= 1.0)
        optimizer.step()
        plain.step()
    for param, other in zip(params, plain_params, strict=True):
        torch.testing.assert_close(param, other, **CLIP[dtype])


@pytest.mark.parametrize("target", [cases.REFERENCE, *cases.TARGETS])
def test_the_norm_is_of_all_groups_and_dtypes(target: Target) -> None:
    """One norm for the optimizer; each group is held to its own limit, a group without one is left alone."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float32)
    params = [Parameter(torch.zeros(8, dtype=dtype, device=target.device)) for dtype in dtypes]
    groups: list[dict[str, Any]] = [
        {"params": params[:2], "clip_grad_norm": 1.0},
        {"params": params[2:3], "clip_grad_norm": 4.0},
        {"params": params[3:], "clip_grad_norm": None},
    ]
    backend = {"backend": target.backend, "arithmetic": "exact"}
    optimizer = fused_optim.SGD(groups, lr=1.0, **backend)
    for index, param in enumerate(params):
        param.grad = torch.full_like(param, index + 1.0)
    norm = math.sqrt(8 * (1 + 4 + 9 + 16))
    optimizer.step()
    for param, gradient, limit in zip(params, (1.0, 2.0, 3.0, 4.0), (1.0, 1.0, 4.0, INF), strict=True):
        expected = -gradient * min(1.0, limit / (norm + 1e-6))
        torch.testing.assert_close(param.float().cpu(), torch.full((8,), expected), rtol=4e-3, atol=0.0)
        assert len(set(param.tolist())) == 1


@pytest.mark.parametrize("magnitude", [1e30, 3e38, 1e-25, 1e-40], ids=str)
@pytest.mark.parametrize("target", [cases.REFERENCE, *cases.TARGETS])
def test_squares_outside_of_float32(magnitude: float, target: Target) -> None:
    """Squares that overflow or vanish in float32: the norm is right all the same."""
    params = [Parameter(torch.zeros(100, device=target.device)) for _ in range(2)]
    max_norm = magnitude / 1000
    optimizer = fused_optim.SGD(
        params, lr=1.0, clip_grad_norm=max_norm, backend=target.backend, skip_nonfinite=True
    )
    for param in params:
        param.grad = torch.full_like(param, magnitude)
    gradient = params[0].grad[0].item()
    optimizer.step()
    assert optimizer.skipped_steps == 0
    norm = gradient * math.sqrt(200)
    expected = -gradient * min(1.0, max_norm / (norm + 1e-6))
    for param in params:
        # One denormal's spacing is all that is left of the smallest values.
        torch.testing.assert_close(param.cpu(), torch.full((100,), expected), rtol=1e-6, atol=1.5e-45)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", [cases.REFERENCE, *cases.TARGETS])
def test_skip_nonfinite(name: str, value: float, target: Target) -> None:
    optimizer, params, plain, plain_params = _pair(name, target, skip_nonfinite=True)
    assert optimizer.skipped_steps == 0
    for step in range(4):
        _set(params, _gradients(step))
        if step in (0, 2):
            params[-2].grad.fill_(value)
            before = _frozen(optimizer, params) if step else [p.detach().clone() for p in params]
            optimizer.step()
            for new, old in zip(_frozen(optimizer, params), before, strict=False):
                assert_same_bits(new, old)
            continue
        optimizer.step()
        _set(plain_params, _gradients(step))
        plain.step()
        _assert_same(optimizer, params, plain, plain_params)
    assert optimizer.skipped_steps == 2


def test_without_skipping_a_nan_goes_through() -> None:
    """The option decides: without it a NaN poisons its own element and no other."""
    params = _params()
    optimizer = fused_optim.AdamW(params)
    _set(params, _gradients(0))
    params[1].grad[7] = NAN
    optimizer.step()
    assert params[1].isnan().nonzero().tolist() == [[7]]
    assert optimizer.skipped_steps == 0


def test_clipping_an_infinite_norm_is_torch_s_too() -> None:
    """clip / inf is 0, and 0 * inf is NaN: only the infinite element is lost; a NaN norm loses all."""
    for value in (INF, NAN):
        params, plain_params = _params(), _params()
        for each in (params, plain_params):
            _set(each, _gradients(0))
            each[1].grad[7] = value
        torch.nn.utils.clip_grad_norm_(plain_params, 1.0)
        fused_optim.SGD(plain_params, lr=0.1).step()
        fused_optim.SGD(params, lr=0.1, clip_grad_norm=1.0).step()
        for param, other in zip(params, plain_params, strict=True):
            assert torch.equal(param.isnan(), other.isnan())


def test_one_skipping_group_skips_all() -> None:
    """A step happens for every parameter or for none."""
    params = _params()
    groups: list[dict[str, Any]] = [{"params": params[:1], "skip_nonfinite": True}, {"params": params[1:]}]
    optimizer = fused_optim.AdamW(groups, lr=0.1)
    _set(params, _gradients(0))
    params[1].grad[5] = INF
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert_same_bits(param, old)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", [cases.REFERENCE, *cases.TARGETS])
def test_scaling_clipping_and_skipping_together(name: str, target: Target) -> None:
    """The norm is that of the unscaled gradients; a skipped step is counted once, whoever found it."""
    clipped = {"clip_grad_norm": 0.5}
    optimizer, params, plain, plain_params = _pair(name, target, both=clipped, skip_nonfinite=True)
    scaler = _scaler(target.device)
    for step in range(6):
        before = _frozen(optimizer, params)
        _scaled_step(scaler, optimizer, params, step, **({"bad": NAN} if step == 3 else {}))
        if step == 3:
            _assert_unchanged(optimizer, params, before)
            continue
        _set(plain_params, _gradients(step))
        plain.step()
        _assert_same(optimizer, params, plain, plain_params)
    assert optimizer.skipped_steps == 1


def test_float64_and_complex_gradients_count_in_the_norm() -> None:
    wide = Parameter(torch.zeros(4, dtype=torch.float64))
    pair = Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = fused_optim.SGD([wide, pair], lr=1.0, clip_grad_norm=1.0)
    wide.grad = torch.full((4,), 2.0, dtype=torch.float64)
    pair.grad = torch.tensor([3 + 4j, 0j])
    norm = math.sqrt(4 * 4.0 + 25.0)
    optimizer.step()
    torch.testing.assert_close(wide.detach(), torch.full((4,), -2 / (norm + 1e-6), dtype=torch.float64))
    torch.testing.assert_close(pair.detach(), torch.tensor([-3 - 4j, 0j]) / norm)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_finite_gradients_whose_squares_overflow_float64_are_not_skipped(device: str, clip: Any) -> None:
    """Clipped they vanish, as in torch, whose norm is infinite; beside one that is infinite they are."""
    dtypes = (torch.float64, torch.float64, torch.float32)
    params = [Parameter(torch.zeros(2, dtype=dtype, device=device)) for dtype in dtypes]
    optimizer = fused_optim.SGD(params, lr=1.0, clip_grad_norm=clip, skip_nonfinite=True)
    for step, small in enumerate((1.0, INF, NAN, 1.0)):
        values = (1e200, (1e200 if step < 3 else NAN), small)
        _set(params, [torch.full_like(p, value) for p, value in zip(params, values, strict=True)])
        optimizer.step()
        assert optimizer.skipped_steps == step
        expected = (1e200, 1e200, 1.0) if clip is None else (0.0, 0.0, 0.0)
        assert [p[0].item() for p in params] == [-value for value in expected]


def test_a_skipped_step_count_does_not_reset() -> None:
    """Momentum after a skip in the middle is the momentum before it."""
    param = Parameter(torch.zeros(1))
    optimizer = fused_optim.SGD([param], lr=1.0, momentum=0.5, skip_nonfinite=True)
    for gradient in (1.0, NAN, 1.0):
        param.grad = torch.tensor([gradient])
        optimizer.step()
    assert param.item() == -1.0 - 1.5


def test_without_any_gradient_nothing_is_skipped() -> None:
    """There is no norm of nothing."""
    params = _params()
    optimizer = fused_optim.AdamW(params, clip_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not optimizer.state
