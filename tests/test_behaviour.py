"""What training loops expect: groups, schedulers, closures, hooks, tensors that come late or move."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler

import fused_optim
from tests.cases import assert_same_bits, normal

CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "AdamW": (fused_optim.AdamW, torch.optim.AdamW, {"lr": 0.01}),
    "Adam": (fused_optim.Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "SGD": (fused_optim.SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
}
ALL = [fused_optim.AdamW, fused_optim.Adam, fused_optim.Lion, fused_optim.SGD]


class Pair:
    """The same parameters under one of our optimizers and under torch's."""

    def __init__(self, name: str, shapes: tuple[tuple[int, ...], ...] = ((3, 4), (5,), (2, 2))) -> None:
        self.shapes = shapes
        self.params = [Parameter(normal(shape, torch.float32, i)) for i, shape in enumerate(shapes)]
        self.others = [Parameter(p.detach().clone()) for p in self.params]
        ours, theirs, self.options = CLASSES[name]
        self._classes = ours, theirs

    def build(self, groups: Callable[[list[Parameter]], Any], **options: Any) -> Any:
        self.ours = self._classes[0](groups(self.params), **{**self.options, **options})
        self.theirs = self._classes[1](groups(self.others), **{**self.options, **options})
        return self

    def both(self, action: Callable[[Any, list[Parameter]], Any]) -> tuple[Any, Any]:
        return action(self.ours, self.params), action(self.theirs, self.others)

    def step(self, number: int, without: tuple[int, ...] = ()) -> None:
        for params, optimizer in ((self.params, self.ours), (self.others, self.theirs)):
            for index, param in enumerate(params):
                gradient = normal(tuple(param.shape), torch.float32, 100 * number + index)
                param.grad = None if index in without else gradient
            optimizer.step()

    def check(self) -> None:
        for index, (param, other) in enumerate(zip(self.params, self.others, strict=True)):
            torch.testing.assert_close(param, other, rtol=2e-6, atol=2e-6, msg=lambda m, i=index: f"{i}: {m}")


def _all(params: list[Parameter]) -> Any:
    return params


@pytest.mark.parametrize("name", CLASSES)
def test_options_per_group(name: str) -> None:
    def groups(params: list[Parameter]) -> Any:
        return [
            {"params": params[:1], "lr": 0.2, "weight_decay": 0.5},
            {"params": params[1:], "maximize": True},
        ]

    pair = Pair(name).build(groups)
    for number in range(5):
        pair.step(number)
    pair.check()


def test_amsgrad_and_not_in_one_optimizer() -> None:
    pair = Pair("AdamW").build(lambda ps: [{"params": ps[:1], "amsgrad": True}, {"params": ps[1:]}])
    for number in range(5):
        pair.step(number)
    pair.check()
    assert "max_exp_avg_sq" in pair.ours.state[pair.params[0]]
    assert "max_exp_avg_sq" not in pair.ours.state[pair.params[1]]


def test_momentum_and_not_in_one_optimizer() -> None:
    pair = Pair("SGD").build(
        lambda ps: [{"params": ps[:1], "momentum": 0.0}, {"params": ps[1:], "nesterov": True}]
    )
    for number in range(5):
        pair.step(number)
    pair.check()


@pytest.mark.parametrize("name", CLASSES)
def test_a_group_that_joins_in_the_middle(name: str) -> None:
    pair = Pair(name).build(lambda params: params[:2])
    for number in range(3):
        pair.step(number)
    pair.both(lambda optimizer, params: optimizer.add_param_group({"params": params[2:], "lr": 0.3}))
    for number in range(3, 6):
        pair.step(number)
    pair.check()
    steps = [pair.ours.state[p]["step"].item() for p in pair.params]
    assert steps == [6, 6, 3]


@pytest.mark.parametrize("name", CLASSES)
def test_gradients_that_come_late_and_go(name: str) -> None:
    """Each parameter counts its own steps; one without a gradient is left alone."""
    pair = Pair(name).build(_all)
    without: list[tuple[int, ...]] = [(1, 2), (1,), (), (0,), (0, 1, 2), (2,), ()]
    for number, missing in enumerate(without):
        before = [p.detach().clone() for p in pair.params]
        pair.step(number, missing)
        for index, (param, old) in enumerate(zip(pair.params, before, strict=True)):
            assert torch.equal(param, old) == (index in missing)
    pair.check()
    assert [pair.ours.state[p]["step"].item() for p in pair.params] == [5, 4, 4]


def test_frozen_parameters_thaw() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = fused_optim.AdamW(model.parameters(), lr=0.1)
    frozen = model[0].weight.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        model[0].requires_grad_(step >= 2)
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        assert torch.equal(model[0].weight, frozen) == (step < 2)
    assert optimizer.state[model[0].weight]["step"].item() == 2
    assert optimizer.state[model[1].weight]["step"].item() == 4


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1 + step)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_schedulers(name: str, scheduler: str) -> None:
    """Also those that move beta1 or momentum (OneCycleLR, CyclicLR)."""
    pair = Pair(name).build(_all)
    schedules = pair.both(lambda optimizer, _: SCHEDULERS[scheduler](optimizer))
    lrs = []
    for number in range(8):
        pair.step(number)
        for schedule in schedules:
            schedule.step()
        lrs.append(pair.ours.param_groups[0]["lr"])
        assert lrs[-1] == pair.theirs.param_groups[0]["lr"]
    assert len(set(lrs)) > 2
    pair.check()


@pytest.mark.parametrize("cls", ALL)
def test_tensor_lr_is_read_at_every_step(cls: Any) -> None:
    params = [Parameter(normal((5,), torch.float32, 1)) for _ in range(2)]
    lr = torch.tensor(0.1, dtype=torch.float64)
    by_tensor, by_float = cls(params[:1], lr=lr), cls(params[1:], lr=0.1)
    for step, value in enumerate((0.1, 0.1, 0.5, 0.02)):
        lr.fill_(value)
        by_float.param_groups[0]["lr"] = value
        for param in params:
            param.grad = normal((5,), torch.float32, 10 + step)
        by_tensor.step()
        by_float.step()
        assert_same_bits(*params)
    scheduler = lr_scheduler.ExponentialLR(by_tensor, 0.5)
    by_tensor.step()
    scheduler.step()
    assert lr.item() == pytest.approx(0.01)
    assert by_tensor.param_groups[0]["lr"] is lr


def test_tensor_betas_are_read_at_every_step() -> None:
    params = [Parameter(normal((5,), torch.float32, 1)) for _ in range(2)]
    betas = tuple(torch.tensor([0.9, 0.99], dtype=torch.float64))
    by_tensor, by_float = (
        fused_optim.AdamW(params[:1], betas=betas),
        fused_optim.AdamW(params[1:], betas=(0.9, 0.99)),
    )
    for step, beta in enumerate((0.9, 0.8, 0.7)):
        betas[0].fill_(beta)
        by_float.param_groups[0]["betas"] = (beta, 0.99)
        for param in params:
            param.grad = normal((5,), torch.float32, 10 + step)
        by_tensor.step()
        by_float.step()
        assert_same_bits(*params)


@pytest.mark.parametrize(
    "option",
    [{"weight_decay": 0.5}, {"maximize": True}, {"eps": 0.1}, {"betas": (0.5, 0.5)}, {"amsgrad": True}],
    ids=str,
)
def test_options_changed_in_the_middle(option: dict[str, Any]) -> None:
    pair = Pair("AdamW").build(_all, amsgrad=False)
    for number in range(2):
        pair.step(number)
    before = [p.detach().clone() for p in pair.others]
    if option == {"amsgrad": True}:
        # torch cannot: its states lack the maximum; ours begins it with zero, like torch's own first step.
        for other in pair.others:
            pair.theirs.state[other]["max_exp_avg_sq"] = torch.zeros_like(other)
    pair.both(lambda optimizer, _: optimizer.param_groups[0].update(option))
    for number in range(2, 5):
        pair.step(number)
    pair.check()
    assert not torch.equal(before[0], pair.others[0])


@pytest.mark.parametrize("cls", ALL)
def test_closure(cls: Any) -> None:
    param = Parameter(torch.tensor([1.0, -2.0]))
    optimizer = cls([param], lr=0.1)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert isinstance(loss, Tensor) and loss.item() == 5.0
    assert calls == [5.0]
    assert param.abs().lt(torch.tensor([1.0, 2.0])).all()
    assert optimizer.step() is None
    assert optimizer.step(closure=lambda: "anything") == "anything"


def test_the_update_is_not_recorded_by_autograd() -> None:
    param = Parameter(torch.ones(3))
    optimizer = fused_optim.AdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.is_leaf and param.requires_grad
    assert all(not value.requires_grad for value in optimizer.state[param].values())
    old = param.detach().clone()
    loss = (param * 2).sum()
    param.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(param, old)
    loss.backward()


def test_autograd_notices_a_parameter_that_changed_under_it() -> None:
    """A backward pass through saved values that step() overwrote must fail, as it does with torch.optim."""
    for cls in (torch.optim.SGD, fused_optim.SGD):
        param = Parameter(torch.ones(3))
        loss = (param * param).sum()
        param.grad = torch.ones(3)
        cls([param], lr=0.5).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_hooks() -> None:
    param = Parameter(torch.ones(2))
    optimizer = fused_optim.SGD([param], lr=1.0)
    seen: list[tuple[str, float]] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", param[0].item())))
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", param[0].item())))
    param.grad = torch.ones(2)
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == [("pre", 1.0), ("post", 0.0), ("pre", 0.0)]


def test_zero_grad_and_the_memory_of_gradients() -> None:
    """The plan must not keep gradients alive that ``zero_grad`` lets go."""
    param = Parameter(torch.ones(1000))
    optimizer = fused_optim.AdamW([param])
    for _ in range(2):
        param.grad = torch.ones(1000)
        optimizer.step()
        reference = weakref.ref(param.grad)
        optimizer.zero_grad()
        gc.collect()
        assert param.grad is None and reference() is None
    param.grad = torch.ones(1000)
    optimizer.zero_grad(set_to_none=False)
    assert param.grad is not None and not param.grad.any()


@pytest.mark.parametrize("cls", ALL)
def test_optimizer_and_parameters_are_freed(cls: Any) -> None:
    param = Parameter(torch.ones(10))
    param.grad = torch.ones(10)
    optimizer = cls([param])
    optimizer.step()
    references = [weakref.ref(param), weakref.ref(optimizer)]
    del param, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}], ids=str
)
@pytest.mark.parametrize("cls", ALL)
def test_foreach_and_fused_have_no_effect(cls: Any, flags: dict[str, bool]) -> None:
    params = [Parameter(normal((7,), torch.float32, 1)) for _ in range(2)]
    for param, optimizer in zip(params, (cls(params[:1]), cls(params[1:], **flags)), strict=True):
        param.grad = normal((7,), torch.float32, 2)
        optimizer.step()
    assert_same_bits(*params)


@pytest.mark.parametrize("cls", ALL)
def test_mixed_dtypes_in_one_group(cls: Any) -> None:
    """The same as one optimizer each."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64, torch.complex128]
    params = [Parameter(normal((9, 2), torch.float32, i).to(dtype)) for i, dtype in enumerate(dtypes)]
    clones = [Parameter(p.detach().clone()) for p in params]
    together, alone = cls(params, lr=0.1), [cls([clone], lr=0.1) for clone in clones]
    for step in range(3):
        for index, (param, clone) in enumerate(zip(params, clones, strict=True)):
            clone.grad = normal((9, 2), torch.float32, 10 * step + index).to(param.dtype)
            param.grad = clone.grad.clone()
        together.step()
        for optimizer in alone:
            optimizer.step()
    for param, clone, optimizer in zip(params, clones, alone, strict=True):
        assert_same_bits(param, clone, str(param.dtype))
        for key, value in together.state[param].items():
            assert_same_bits(value, optimizer.state[clone][key], f"{key} of {param.dtype}")


def test_state_dtypes_by_default() -> None:
    """fp32 states for narrow parameters: with bf16 states the second moment stalls (torch does that)."""
    wide = {
        torch.float64: torch.float64,
        torch.complex64: torch.complex64,
        torch.complex128: torch.complex128,
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16, *wide):
        param = Parameter(torch.ones(3, dtype=dtype))
        optimizer = fused_optim.AdamW([param])
        param.grad = torch.ones_like(param)
        optimizer.step()
        state = optimizer.state[param]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
        assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {wide.get(dtype, torch.float32)}
        assert (state["step"].dtype, state["step"].shape, state["step"].device.type) == (
            torch.float32,
            (),
            "cpu",
        )


def test_bf16_training_does_not_stall() -> None:
    """2000 unit gradients: the second moment is 0.865; torch.optim.AdamW's stops at 0.5 or 0.25 (fused)."""
    param = Parameter(torch.zeros(8, dtype=torch.bfloat16))
    optimizer = fused_optim.AdamW([param], lr=1e-5)
    param.grad = torch.ones(8, dtype=torch.bfloat16)
    for _ in range(2000):
        optimizer.step()
    expected = 1 - 0.999**2000
    torch.testing.assert_close(
        optimizer.state[param]["exp_avg_sq"], torch.full((8,), expected), rtol=1e-4, atol=0.0
    )


def test_empty_and_scalar_parameters() -> None:
    pair = Pair("AdamW", ((), (0,), (2, 0, 3), (1, 1, 1), (0, 0))).build(_all)
    for number in range(3):
        pair.step(number)
    pair.check()
    for param in pair.params:
        assert pair.ours.state[param]["exp_avg"].shape == param.shape
        assert pair.ours.state[param]["step"].item() == 3
