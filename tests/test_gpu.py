"""What only a GPU has: graphs, steps that the host does not wait for, two devices, fast arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import FusedOptimizer
from tests.cases import assert_same_bits, normal

pytestmark = pytest.mark.gpu

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fused_optim.AdamW, {}),
    "Adam-amsgrad": (fused_optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "Lion": (fused_optim.Lion, {"weight_decay": 0.1}),
    "SGD": (fused_optim.SGD, {"weight_decay": 0.1}),
    "SGD-momentum": (fused_optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
}
BACKENDS = ["triton", "cuda", "reference"]
SHAPES = ((3, 5), (257,), (), (0,), (70_000,))
CLIPPED = {"clip_grad_norm": 0.5, "skip_nonfinite": True}


def _params(device: str = "cuda") -> list[Parameter]:
    return [Parameter(normal(shape, torch.float32, i).to(device)) for i, shape in enumerate(SHAPES)]


def _set(params: list[Parameter], step: int, bad: float | None = None) -> None:
    """New values in the same gradient tensors, as a captured backward pass leaves them."""
    for index, param in enumerate(params):
        gradient = normal(tuple(param.shape), torch.float32, 100 * step + index)
        if bad is not None and index == 1:
            gradient[100] = bad
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(gradient)


def _build(name: str, params: list[Parameter], backend: str, **options: Any) -> FusedOptimizer:
    optimizer_class, own = CLASSES[name]
    return optimizer_class(params, **own, **options, backend=backend, arithmetic="exact")


def _assert_same(
    a: FusedOptimizer, a_params: list[Parameter], b: FusedOptimizer, b_params: list[Parameter]
) -> None:
    for index, (p, q) in enumerate(zip(a_params, b_params, strict=True)):
        assert_same_bits(p, q, f"parameter {index}")
        for key, value in a.state[p].items():
            assert_same_bits(value, b.state[q][key], f"{key} of parameter {index}")


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(optimizer: FusedOptimizer) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.parametrize("options", [{}, CLIPPED], ids=["plain", "clipped"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_replayed_graphs_equal_steps(name: str, backend: str, options: dict[str, Any]) -> None:
    """With another lr, new gradients and eager steps in between; a NaN skips a replay as it skips a step."""
    params, others = _params(), _params("cpu")
    lr = torch.tensor(0.1, dtype=torch.float64, device="cuda")
    optimizer = _build(name, params, backend, lr=lr, capturable=True, **options)
    expected = _build(name, others, "reference", lr=0.1, **options)
    graph = None
    for step in range(8):
        value = 0.1 / (1 + step)
        lr.fill_(value)
        expected.param_groups[0]["lr"] = value
        bad = float("nan") if options and step == 4 else None
        _set(params, step, bad)
        _set(others, step, bad)
        if graph is None or step == 5:
            optimizer.step()
        else:
            graph.replay()
        if step == 1:
            _set(params, 99)
            graph = _captured(optimizer)
        expected.step()
        _assert_same(optimizer, params, expected, others)
    assert optimizer.state[params[0]]["step"].is_cuda
    assert optimizer.skipped_steps == expected.skipped_steps == bool(options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_needs_capturable_and_a_first_step(backend: str) -> None:
    params = _params()
    for options, message in (({}, "capturable=True"), ({"capturable": True}, "run once before")):
        optimizer = _build("AdamW", params, backend, **options)
        _set(params, 0)
        before = [p.detach().clone() for p in params]
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
        torch.cuda.synchronize()
        for param, old in zip(params, before, strict=True):
            assert_same_bits(param, old)


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_grad_norm": 0.5}, {"skip_nonfinite": True}, {**CLIPPED, "capturable": True}],
    ids=["plain", "clip", "skip", "all"],
)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_the_host_never_waits(name: str, backend: str, options: dict[str, Any]) -> None:
    params = _params()
    optimizer = _build(name, params, backend, lr=0.1, **options)
    _set(params, 0)
    optimizer.step()
    optimizer.step()
    for step in range(1, 4):
        gradients = [normal(tuple(p.shape), torch.float32, step).cuda() for p in params]
        torch.cuda.synchronize()
        with _no_waiting():
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
            optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_grad_scaler_without_waiting(name: str, backend: str) -> None:
    """A whole scaled loop, skipped steps among it; afterwards equal to the loop without a scaler."""
    params, others = _params(), _params("cpu")
    optimizer = _build(name, params, backend, lr=0.1)
    expected = _build(name, others, "reference", lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=3)
    one = torch.ones((), device="cuda")
    scale = 1024.0
    for step in range(8):
        bad = float("inf") if step in (0, 4) else None
        _set(params, step, bad)
        for param in params:
            assert param.grad is not None
            param.grad.mul_(scale)
        with _no_waiting() if step > 1 else nullcontext():
            scaler.scale(one)
            scaler.step(optimizer)
            scaler.update()
        scale = scaler.get_scale()
        if bad is None:
            _set(others, step)
            expected.step()
        if step:
            _assert_same(optimizer, params, expected, others)
    assert optimizer.skipped_steps == 2
    assert scale == 512.0


def _assert_goes_on(
    resumed: FusedOptimizer, others: list[Parameter], optimizer: FusedOptimizer, params: list[Parameter]
) -> None:
    """Both have the same bits after steps 3 to 5 when the one has loaded what the other has."""
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    resumed.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        for each, tensors in ((optimizer, params), (resumed, others)):
            _set(tensors, step)
            each.step()
    _assert_same(resumed, others, optimizer, params)


@pytest.mark.parametrize("capturable", [False, True], ids=["host_steps", "device_steps"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_resume(backend: str, capturable: bool) -> None:
    params, others = _params(), _params()
    optimizer = _build("AdamW", params, backend, lr=0.1, capturable=capturable)
    for step in range(3):
        _set(params, step)
        optimizer.step()
    _assert_goes_on(_build("AdamW", others, backend, lr=0.5), others, optimizer, params)


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu() -> None:
    params, others = _params(), _params("cpu")
    optimizer, resumed = _build("AdamW", params, "triton", lr=0.1), _build("AdamW", others, "native", lr=0.1)
    for step in range(3):
        _set(params, step)
        optimizer.step()
    _assert_goes_on(resumed, others, optimizer, params)


@pytest.mark.parametrize("options", [{}, CLIPPED], ids=["plain", "clipped"])
@pytest.mark.parametrize("name", CLASSES)
def test_two_devices_in_one_group(name: str, options: dict[str, Any]) -> None:
    """One norm and one decision for both."""
    params, others = _params(), _params("cpu")
    for index in (0, 4):
        params[index] = Parameter(params[index].detach().cpu())
    optimizer = _build(name, params, "auto", lr=0.1, **options)
    expected = _build(name, others, "reference", lr=0.1, **options)
    for step in range(5):
        bad = float("inf") if options and step in (0, 3) else None
        _set(params, step, bad)
        _set(others, step, bad)
        optimizer.step()
        expected.step()
        if step or not options:
            _assert_same(optimizer, params, expected, others)
    assert optimizer.skipped_steps == expected.skipped_steps == 2 * bool(options)


def _distance(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """In units in the last place of ``scale``."""
    unit = torch.nextafter(scale, torch.full_like(scale, torch.inf)) - scale
    return float(((a - b).abs() / unit).max())


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_fast_arithmetic_is_within_two_ulps(name: str, backend: str) -> None:
    """Of the largest value that met in an element's update."""
    exact_params, fast_params = _params(), _params()
    start = [p.detach().clone() for p in exact_params]
    optimizer_class, own = CLASSES[name]
    exact, fast = (
        optimizer_class(params, **own, lr=0.1, backend=backend, arithmetic=arithmetic)
        for params, arithmetic in ((exact_params, "exact"), (fast_params, "fast"))
    )
    for params, optimizer in ((exact_params, exact), (fast_params, fast)):
        _set(params, 0)
        optimizer.step()
    for p, q, old in zip(exact_params, fast_params, start, strict=True):
        if not p.numel():
            continue
        moved = (p - old).abs()
        assert moved.max() > 0
        assert _distance(p, q, torch.maximum(old.abs(), moved).detach()) <= 2
        for key, value in exact.state[p].items():
            other = fast.state[q][key]
            assert _distance(value, other, value.abs().clamp(min=1e-30)) <= 2, key
