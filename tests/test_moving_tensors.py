"""Tensors that move, are replaced, emptied or subclassed between steps, and step counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fused_optim
from fused_optim import FusedOptimizer
from fused_optim.kernels import rows
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.spec import Rule
from tests.cases import assert_same_bits, hypers, normal

CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "AdamW": (fused_optim.AdamW, torch.optim.AdamW, {"lr": 0.01}),
    "Adam": (fused_optim.Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "SGD": (fused_optim.SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
}
ALL = [fused_optim.AdamW, fused_optim.Adam, fused_optim.Lion, fused_optim.SGD]


def _steps(optimizer: FusedOptimizer, params: list[Parameter], numbers: range) -> None:
    for number in numbers:
        for index, param in enumerate(params):
            param.grad = normal(tuple(param.shape), torch.float32, 100 * number + index).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    "move",
    [
        lambda p: setattr(p, "data", p.data.clone()),
        lambda p: setattr(p, "data", p.data.t().contiguous().t()),
        lambda p: p.data.untyped_storage().resize_(2 * p.data.untyped_storage().nbytes()),
        lambda p: p.data.set_(p.data.clone()),
    ],
    ids=["data", "other_strides", "resized_storage", "set_"],
)
def test_parameters_that_move(move: Callable[[Any], Any]) -> None:
    """The plan holds addresses: tensors that were re-allocated between steps must be found."""
    params = [Parameter(normal((4, 4), torch.float32, i)) for i in range(2)]
    clones = [Parameter(p.detach().clone()) for p in params]
    moved, still = fused_optim.SGD(params, lr=0.1), fused_optim.SGD(clones, lr=0.1)
    _steps(moved, params, range(2))
    _steps(still, clones, range(2))
    keep = params[1].data
    move(params[1])
    _steps(moved, params, range(2, 4))
    _steps(still, clones, range(2, 4))
    for param, clone in zip(params, clones, strict=True):
        assert_same_bits(param, clone)
    del keep


def test_a_model_converted_in_the_middle() -> None:
    """model.bfloat16() after some steps: states stay as they are, parameters are found in their new dtype."""
    model = torch.nn.Linear(4, 4)
    optimizer = fused_optim.AdamW(model.parameters(), lr=0.1)
    params = list(model.parameters())
    _steps(optimizer, params, range(2))
    moments = optimizer.state[params[0]]["exp_avg"].clone()
    model.bfloat16()
    assert_same_bits(optimizer.state[params[0]]["exp_avg"], moments)
    before = params[0].detach().clone()
    _steps(optimizer, params, range(2, 4))
    assert params[0].dtype == torch.bfloat16 and not torch.equal(params[0], before)
    assert optimizer.state[params[0]]["step"].item() == 4


def test_replaced_parameters() -> None:
    """Frameworks swap the tensors of a group for others of their own."""
    param = Parameter(torch.ones(3))
    optimizer = fused_optim.SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    optimizer.step()
    other = Parameter(torch.full((3,), 5.0))
    other.grad = torch.ones(3)
    optimizer.param_groups[0]["params"] = [other]
    optimizer.step()
    assert param.tolist() == [0.0] * 3
    assert other.tolist() == [4.0] * 3


def test_cleared_state_starts_anew() -> None:
    """Resetting an optimizer by emptying its state is common after warm restarts."""
    params = [Parameter(normal((5,), torch.float32, 1)) for _ in range(2)]
    used, fresh = fused_optim.AdamW(params[:1], lr=0.1), fused_optim.AdamW(params[1:], lr=0.1)
    _steps(used, params[:1], range(3))
    used.state.clear()
    params[1].data.copy_(params[0].data)
    _steps(used, params[:1], range(3, 5))
    _steps(fresh, params[1:], range(3, 5))
    assert_same_bits(*params)
    assert used.state[params[0]]["step"].item() == 2


def test_a_step_count_set_by_hand() -> None:
    params = [Parameter(normal((5,), torch.float32, 1)) for _ in range(2)]
    optimizers = [fused_optim.AdamW([p], lr=0.1) for p in params]
    for optimizer, param in zip(optimizers, params, strict=True):
        _steps(optimizer, [param], range(2))
    optimizers[0].state[params[0]]["step"].fill_(100.0)
    optimizers[1].state[params[1]]["step"] = torch.tensor(100.0)
    for optimizer, param in zip(optimizers, params, strict=True):
        _steps(optimizer, [param], range(2, 4))
        assert optimizer.state[param]["step"].item() == 102
    assert_same_bits(*params)


def test_thousands_of_steps_count_exactly() -> None:
    param = Parameter(torch.zeros(1))
    optimizer = fused_optim.SGD([param], lr=1.0)
    param.grad = torch.full((1,), -1.0)
    for _ in range(3000):
        optimizer.step()
    assert param.item() == 3000.0
    assert optimizer.state[param]["step"].item() == 3000.0


@pytest.mark.parametrize("cls", ALL)
def test_only_empty_parameters(cls: Any) -> None:
    param = Parameter(torch.zeros(0, 3))
    param.grad = torch.zeros(0, 3)
    optimizer = cls([param], clip_grad_norm=1.0, skip_nonfinite=True)
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[param]["step"].item() == 2
    assert optimizer.skipped_steps == 0


def test_a_subclassed_parameter() -> None:
    """Frameworks derive from nn.Parameter to carry attributes; memory and update stay the same."""

    class Tagged(Parameter):
        tag = "expert"

    params = [Tagged(normal((5,), torch.float32, 1)), Parameter(normal((5,), torch.float32, 1))]
    optimizer = fused_optim.AdamW(params, lr=0.1)
    for step in range(3):
        for param in params:
            param.grad = normal((5,), torch.float32, 5 + step)
        optimizer.step()
    assert_same_bits(params[0].data, params[1].data)
    assert type(params[0]) is Tagged


def test_the_whole_state_is_in_torch_s_place() -> None:
    optimizer = fused_optim.AdamW([Parameter(torch.ones(2))])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "AdamW" in repr(optimizer) and "weight_decay: 0.01" in repr(optimizer)
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("step", [1.0, 2.0, 3.0, 1000.0, 1e6])
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_rows_made_on_a_device_equal_rows_made_on_the_host(rule: Rule, step: float) -> None:
    """Capturable steps prepare their scalars with float64 tensors instead of Python floats."""
    device = torch.device("cpu")
    for group in hypers(rule):
        tensors = {**group, "lr": torch.tensor(group["lr"], dtype=torch.float64)}
        tensors["betas"] = tuple(torch.tensor(group["betas"], dtype=torch.float64))
        hyper = rows.resolve(tensors, device)
        g_scale = torch.tensor(0.3, dtype=torch.float64)
        values = rows.row(rule, hyper, torch.tensor([step, step], dtype=torch.float64), g_scale)
        written = torch.full((2, rule.row_length), float("nan"))
        rows.write(written, values, torch.tensor(True))
        expected = torch.tensor(rows.host_row(rows.row(rule, rows.resolve(tensors), step, 0.3)))
        assert_same_bits(written, expected.float().expand(2, -1))
        rows.write(written, values, torch.tensor(False))
        assert written[:, 0].tolist() == [0.0, 0.0]
        rows.write(written, values, None)
        assert written[:, 0].tolist() == [1.0, 1.0]
