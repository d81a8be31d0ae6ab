"""Our classes in place of torch's: the same inputs, errors and trajectories, and lion-pytorch's Lion."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fused_optim

# Neither needs a GPU: a machine for GPU tests alone may lack them.
lion_pytorch = pytest.importorskip("lion_pytorch")
pytest.importorskip("expecttest", reason="torch's list of optimizers needs expecttest")
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db  # noqa: E402

OURS: dict[Any, Any] = {
    torch.optim.Adam: fused_optim.Adam,
    torch.optim.AdamW: fused_optim.AdamW,
    torch.optim.SGD: fused_optim.SGD,
    lion_pytorch.Lion: fused_optim.Lion,
}
STEPS = 13
TOLERANCE = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},
    torch.float64: {"rtol": 1e-14, "atol": 1e-14},
    torch.complex64: {"rtol": 1e-6, "atol": 1e-6},
    torch.complex128: {"rtol": 1e-14, "atol": 1e-14},
}
"""torch rounds the same operations in another order; parameters and gradients are of size one."""
SHAPES = ((3, 4), (5,), (), (0,), (2, 0, 3), (1,))
DTYPES_AND_BACKENDS = [
    pytest.param(dtype, backend, id=f"{str(dtype).removeprefix('torch.')}-{backend}")
    for dtype in TOLERANCE
    for backend in ("reference", "native")
    if backend == "reference" or dtype not in (torch.float64, torch.complex128)
]


def _infos() -> list[Any]:
    return [info for info in optim_db if info.optim_cls in OURS]


def _inputs() -> Iterator[Any]:
    for info in _infos():
        for item in info.optim_inputs_func(device="cpu"):
            yield pytest.param(info.optim_cls, item.kwargs, id=f"{info.optim_cls.__name__}-{item.desc}")


def _error_inputs() -> Iterator[Any]:
    for info in _infos():
        for item in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            name = f"{info.optim_cls.__name__}-{item.optimizer_error_input.desc or item.error_regex}"
            yield pytest.param(info.optim_cls, item, id=name)


def test_torch_lists_the_optimizers_that_we_replace() -> None:
    counts = {info.optim_cls.__name__: len(list(info.optim_inputs_func(device="cpu"))) for info in _infos()}
    assert set(counts) == {"Adam", "AdamW", "SGD"}
    assert min(counts.values()) >= 5


def _params(dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in SHAPES]


def _set_gradients(params: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, dtype=param.dtype, generator=generator)


def _compare(optim_cls: Any, kwargs: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Thirteen steps of torch's class and ours; then parameters and every state that torch keeps."""
    our_params, their_params = _params(dtype), _params(dtype)
    ours = OURS[optim_cls](our_params, **copy.deepcopy(kwargs), backend=backend)
    theirs = optim_cls(their_params, **copy.deepcopy(kwargs))
    for step in range(STEPS):
        _set_gradients(our_params, step)
        _set_gradients(their_params, step)
        ours.step()
        theirs.step()
    for param, other, start in zip(our_params, their_params, _params(dtype), strict=True):
        assert not torch.equal(param, start) or not param.numel(), (
            "a parameter that stands still proves nothing"
        )
        torch.testing.assert_close(param, other, **TOLERANCE[dtype])
        kept = {key: value for key, value in theirs.state.get(other, {}).items() if value is not None}
        for key, value in kept.items():
            torch.testing.assert_close(ours.state[param][key], torch.as_tensor(value), **TOLERANCE[dtype])
        assert set(kept) <= set(ours.state[param]) <= {*kept, "step"}


@pytest.mark.parametrize(("dtype", "backend"), DTYPES_AND_BACKENDS)
@pytest.mark.parametrize(("optim_cls", "kwargs"), list(_inputs()))
def test_torch_inputs(optim_cls: Any, kwargs: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    _compare(optim_cls, kwargs, dtype, backend)


WIDE = partial(torch.tensor, dtype=torch.float64)
"""torch computes with tensor options in their own dtype; ours always in float64."""
MORE_OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW-betas,eps": (torch.optim.AdamW, {"betas": (0.5, 0.8), "eps": 1e-3}),
    "AdamW-all": (torch.optim.AdamW, {"amsgrad": True, "maximize": True, "weight_decay": 0.3}),
    "AdamW-tensors": (
        torch.optim.AdamW,
        {"lr": WIDE(0.02), "betas": (WIDE(0.8), WIDE(0.9))},
    ),
    "AdamW-lr_of_one_element": (torch.optim.AdamW, {"lr": torch.tensor([0.02], dtype=torch.float64)}),
    "AdamW-foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW-for_loop": (torch.optim.AdamW, {"foreach": False}),
    "Adam-decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.2}),
    "Adam-all": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.2, "maximize": True}),
    "SGD-dampening,maximize": (
        torch.optim.SGD,
        {"momentum": 0.9, "dampening": 0.5, "maximize": True, "weight_decay": 0.1},
    ),
    "SGD-negative_dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": -0.5}),
    "SGD-nesterov,maximize": (torch.optim.SGD, {"momentum": 0.7, "nesterov": True, "maximize": True}),
    "SGD-tensor_lr,momentum": (torch.optim.SGD, {"lr": torch.tensor(0.03), "momentum": 0.9}),
    "SGD-dampening_alone": (torch.optim.SGD, {"dampening": 0.5, "lr": 0.1}),
    "Lion-default": (lion_pytorch.Lion, {"lr": 0.01}),
    "Lion-decay": (lion_pytorch.Lion, {"lr": 0.02, "weight_decay": 0.5}),
    "Lion-betas": (lion_pytorch.Lion, {"lr": 0.02, "betas": (0.95, 0.98), "weight_decay": 0.1}),
}
"""What torch's own list leaves out."""


@pytest.mark.parametrize(("dtype", "backend"), DTYPES_AND_BACKENDS)
@pytest.mark.parametrize("name", MORE_OPTIONS)
def test_more_options(name: str, dtype: torch.dtype, backend: str) -> None:
    if name.startswith("Lion") and dtype.is_complex:
        # lion-pytorch takes the sign of a complex number as its direction; ours has two real parts.
        dtype = torch.float32
    optim_cls, kwargs = MORE_OPTIONS[name]
    _compare(optim_cls, kwargs, dtype, backend)


@pytest.mark.parametrize(("optim_cls", "item"), list(_error_inputs()))
def test_torch_error_inputs(optim_cls: Any, item: Any) -> None:
    params, kwargs = item.optimizer_error_input.params, item.optimizer_error_input.kwargs
    assert item.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(item.error_type, Warning):
        with pytest.warns(item.error_type, match=item.error_regex):
            OURS[optim_cls](params, **kwargs)
        return
    choices = [params] if params is not None else [None, [Parameter(torch.ones(2))]]
    for given in choices:
        with pytest.raises(item.error_type, match=item.error_regex):
            OURS[optim_cls](given, **kwargs)


@pytest.mark.parametrize("optim_cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"lr": -1.0},
        {"eps": -1e-8},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"weight_decay": -0.5},
        {"momentum": -0.1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ],
    ids=str,
)
def test_what_torch_refuses_is_refused_with_the_same_type(optim_cls: Any, kwargs: dict[str, Any]) -> None:
    """With torch's own first words, so that code that matches on them goes on to work."""
    try:
        optim_cls([Parameter(torch.ones(2))], **kwargs)
    except TypeError:
        with pytest.raises(TypeError, match=next(iter(kwargs))):
            OURS[optim_cls]([Parameter(torch.ones(2))], **kwargs)
        return
    except Exception as error:
        expected = error
    else:
        raise AssertionError(f"torch accepts {kwargs}")
    with pytest.raises(type(expected)) as refused:
        OURS[optim_cls]([Parameter(torch.ones(2))], **kwargs)
    first_words = str(expected).split(":")[0].rstrip(".")
    assert str(refused.value).startswith(first_words)


@pytest.mark.parametrize("optim_cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_arguments_have_torch_names_order_and_defaults(optim_cls: Any) -> None:
    ours, theirs = (cls([Parameter(torch.ones(1))]) for cls in (OURS[optim_cls], optim_cls))
    assert {key: value for key, value in ours.defaults.items() if key in theirs.defaults} == theirs.defaults
    names = OURS[optim_cls].__init__.__code__.co_varnames
    expected = optim_cls.__init__.__code__
    assert names[: expected.co_argcount] == expected.co_varnames[: expected.co_argcount]


def test_lion_defaults_are_those_of_lion_pytorch() -> None:
    theirs = lion_pytorch.Lion([Parameter(torch.ones(1))]).defaults
    ours = fused_optim.Lion([Parameter(torch.ones(1))]).defaults
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize("cls", OURS.values())
def test_duplicate_parameter_warns_like_torch_and_is_refused_at_the_step(cls: Any) -> None:
    param = Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = cls([param, param])
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize("cls", OURS.values())
def test_no_warning_in_normal_use(cls: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = _params(torch.float32)
        optimizer = cls(params)
        _set_gradients(params, 0)
        optimizer.step()
        cls(params).load_state_dict(optimizer.state_dict())
