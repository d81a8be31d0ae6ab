"""Every bad input: the type and text of the error, and that no parameter, state or step count has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import FusedOptimizer
from fused_optim.kernels import dispatch
from tests.cases import bits

CLASSES = [fused_optim.AdamW, fused_optim.Adam, fused_optim.Lion, fused_optim.SGD]
ADAMS = [fused_optim.AdamW, fused_optim.Adam]
NAN, INF = float("nan"), float("inf")


def _frozen(optimizer: FusedOptimizer) -> Any:
    """Parameters, states and groups, comparable with ==."""
    return (
        [[(id(p), bits(p).tolist()) for p in group["params"]] for group in optimizer.param_groups],
        [{key: bits(value).tolist() for key, value in entry.items()} for entry in optimizer.state.values()],
        [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups],
        optimizer.skipped_steps,
    )


@contextmanager
def _refused(optimizer: FusedOptimizer, error: type[Exception], *words: str) -> Iterator[None]:
    """Fails unless the block raises ``error`` with all of the words, having changed nothing."""
    before = _frozen(optimizer)
    with pytest.raises(error) as raised:
        yield
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"
    assert _frozen(optimizer) == before


def _trained(*params: Any, cls: Any = fused_optim.AdamW, **options: Any) -> FusedOptimizer:
    """An optimizer of a good parameter, already stepped, and of others that have no gradient yet."""
    good = Parameter(torch.ones(3))
    optimizer = cls([good, *params], **{"lr": 0.1, **options})
    good.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(good, torch.ones(3))
    return optimizer


OUT_OF_RANGE: list[tuple[list[Any], dict[str, Any], list[str]]] = [
    (CLASSES, {"lr": -0.1}, ["learning rate", "-0.1", "at least 0"]),
    (CLASSES, {"lr": NAN}, ["learning rate", "nan", "finite"]),
    (CLASSES, {"lr": INF}, ["learning rate", "inf", "finite"]),
    (CLASSES, {"lr": torch.tensor(-1.0)}, ["learning rate", "-1", "at least 0"]),
    (CLASSES, {"lr": torch.ones(2)}, ["lr", "1-element", "(2,)"]),
    (CLASSES, {"weight_decay": -0.1}, ["weight_decay", "-0.1", "at least 0"]),
    (CLASSES, {"weight_decay": NAN}, ["weight_decay", "nan"]),
    (ADAMS, {"eps": -1e-8}, ["epsilon", "-1e-08", "at least 0"]),
    (ADAMS, {"eps": INF}, ["epsilon", "inf", "finite"]),
    (CLASSES[:3], {"betas": (1.0, 0.9)}, ["beta", "index 0", "1.0", "[0, 1)"]),
    (CLASSES[:3], {"betas": (0.9, 1.0)}, ["beta", "index 1", "1.0", "[0, 1)"]),
    (CLASSES[:3], {"betas": (-0.1, 0.9)}, ["beta", "index 0", "-0.1", "[0, 1)"]),
    (CLASSES[:3], {"betas": (0.9, NAN)}, ["beta", "1", "nan", "[0, 1)"]),
    (CLASSES[:3], {"betas": (0.9, torch.tensor(0.99))}, ["betas", "both"]),
    (CLASSES[:3], {"betas": tuple(torch.tensor([0.9, 1.5]))}, ["beta", "index 1", "1.5"]),
    ([fused_optim.SGD], {"momentum": -0.9}, ["momentum", "-0.9", "at least 0"]),
    ([fused_optim.SGD], {"momentum": INF}, ["momentum", "inf"]),
    ([fused_optim.SGD], {"dampening": NAN, "momentum": 0.9}, ["dampening", "nan", "must be finite"]),
    ([fused_optim.SGD], {"nesterov": True}, ["momentum", "zero dampening"]),
    ([fused_optim.SGD], {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ["zero dampening"]),
    (CLASSES, {"clip_grad_norm": -1.0}, ["clip_grad_norm", "-1.0", "at least 0"]),
    (CLASSES, {"clip_grad_norm": NAN}, ["clip_grad_norm", "nan"]),
    (CLASSES, {"differentiable": True}, ["differentiable", "torch.optim"]),
    (CLASSES, {"backend": "opencl"}, ["backend", "opencl", "native", "triton", "cuda", "reference", "auto"]),
    (CLASSES, {"arithmetic": "sloppy"}, ["arithmetic", "sloppy", "exact", "fast"]),
    (CLASSES, {"arithmetic": "fast"}, ["arithmetic", "fast", "GPU", "exact"]),
    (CLASSES, {"state_codec": "int3"}, ["state_codec", "int3", "fp32", "bf16", "fp16"]),
    (CLASSES, {"param_codec": "int3"}, ["param_codec", "int3", "fp32", "bf16", "fp16"]),
    (CLASSES, {"param_codec": "bf16"}, ["param_codec", "bf16", "parameter 0 of group 0", "float32", "auto"]),
    (CLASSES[:3], {"state_codec": {"exp_avg": "int3"}}, ["state_codec", "int3", "fp32"]),
    (CLASSES, {"state_codec": {"exp_average": "bf16"}}, ["state_codec", "exp_average"]),
    (CLASSES[:3], {"state_codec": "fp64"}, ["fp64", "parameter 0 of group 0", "auto"]),
]
WRONG_TYPE: list[tuple[list[Any], dict[str, Any], list[str]]] = [
    (CLASSES, {"lr": "0.1"}, ["lr", "'0.1'", "number"]),
    (CLASSES, {"lr": None}, ["lr", "None", "number"]),
    (CLASSES, {"lr": True}, ["lr", "True", "number"]),
    (CLASSES, {"weight_decay": "0"}, ["weight_decay", "'0'", "number"]),
    (ADAMS, {"eps": None}, ["eps", "None"]),
    (CLASSES[:3], {"betas": 0.9}, ["betas", "0.9", "pair"]),
    (CLASSES[:3], {"betas": (0.9,)}, ["betas", "(0.9,)", "pair"]),
    (CLASSES[:3], {"betas": (0.9, "0.99")}, ["betas[1]", "'0.99'", "number"]),
    ([fused_optim.SGD], {"momentum": "0.9"}, ["momentum", "'0.9'"]),
    ([fused_optim.SGD], {"nesterov": 1, "momentum": 0.9}, ["nesterov", "1", "True or False"]),
    (ADAMS, {"amsgrad": "yes"}, ["amsgrad", "'yes'", "True or False"]),
    ([fused_optim.Adam], {"decoupled_weight_decay": "no"}, ["decoupled_weight_decay", "'no'"]),
    (CLASSES, {"maximize": "no"}, ["maximize", "'no'", "True or False"]),
    (CLASSES, {"capturable": 1}, ["capturable", "1", "True or False"]),
    (CLASSES, {"differentiable": None}, ["differentiable", "None"]),
    (CLASSES, {"foreach": "yes"}, ["foreach", "'yes'", "no effect"]),
    (CLASSES, {"fused": "yes"}, ["fused", "'yes'", "no effect"]),
    (CLASSES, {"clip_grad_norm": "1"}, ["clip_grad_norm", "'1'"]),
    (CLASSES, {"clip_grad_norm": torch.tensor(1.0)}, ["clip_grad_norm", "float", "tensor"]),
    (CLASSES, {"skip_nonfinite": "yes"}, ["skip_nonfinite", "'yes'", "True or False"]),
    (CLASSES, {"state_codec": 8}, ["state_codec", "8"]),
    (CLASSES, {"state_codec": None}, ["state_codec", "None"]),
    (CLASSES, {"backend": None}, ["backend", "None"]),
    (CLASSES, {"learning_rate": 0.1}, ["learning_rate", "lr", "clip_grad_norm"]),
]


def _expand(table: list[tuple[list[Any], dict[str, Any], list[str]]], error: type[Exception]) -> list[Any]:
    return [
        pytest.param(cls, options, error, words, id=f"{cls.__name__}-{options}".replace(" ", ""))
        for classes, options, words in table
        for cls in classes
    ]


BAD_OPTIONS = [*_expand(OUT_OF_RANGE, ValueError), *_expand(WRONG_TYPE, TypeError)]


@pytest.mark.parametrize(("cls", "options", "error", "words"), BAD_OPTIONS)
def test_bad_option(cls: Any, options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    """In the constructor, and in a group that joins later."""
    if ("backend" in options and options["backend"] is None) or "state_codec" in options:
        error = (ValueError, TypeError)  # type: ignore[assignment]
    with pytest.raises(error) as raised:
        cls([Parameter(torch.ones(2))], **options)
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"
    if "learning_rate" in options:
        return
    optimizer = _trained(cls=cls)
    words = [word.replace("group 0", "group 1") for word in words]
    with _refused(optimizer, error, *words):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], **options})
    optimizer.step()


def test_a_group_carries_what_its_user_put_there() -> None:
    """Schedulers and frameworks keep notes in groups (``initial_lr``, ``lr_scale``); torch lets them."""
    group = {"params": [Parameter(torch.ones(2))], "initial_lr": 0.1, "lr_scale": 0.5}
    optimizer = fused_optim.AdamW([group], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1, last_epoch=1)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["lr_scale"] == 0.5
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr_scale"] == 0.5


def _float8() -> Tensor:
    return torch.ones(4).to(torch.float8_e4m3fn)


BAD_PARAMETERS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "not_a_leaf": (lambda: torch.ones(2, requires_grad=True) * 2, ValueError, ["non-leaf", "detach"]),
    "integer": (lambda: torch.ones(2, dtype=torch.int64), TypeError, ["int64", "float32", "bfloat16"]),
    "bool": (lambda: torch.ones(2, dtype=torch.bool), TypeError, ["bool", "float32", "bfloat16"]),
    "float8": (_float8, TypeError, ["float8_e4m3fn", "float32", "bfloat16"]),
    "complex32": (lambda: torch.ones(2, dtype=torch.complex32), TypeError, ["complex32", "complex64"]),
    "sparse": (lambda: torch.eye(3).to_sparse().requires_grad_(), TypeError, ["sparse", "dense"]),
    "a_number": (lambda: 1.0, TypeError, ["float"]),
    "a_string": (lambda: "weight", TypeError, ["str"]),
    "none": (lambda: None, TypeError, ["NoneType"]),
    "conjugated": (
        lambda: torch.ones(2, dtype=torch.complex64).conj().requires_grad_(),
        ValueError,
        ["conj", "resolve_conj"],
    ),
    "negated": (
        lambda: torch.ones(2, dtype=torch.complex64).conj().imag.requires_grad_(),
        ValueError,
        ["neg"],
    ),
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", BAD_PARAMETERS)
@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
def test_bad_parameter(kind: str, cls: Any) -> None:
    make, error, words = BAD_PARAMETERS[kind]
    named = [] if kind in ("a_number", "a_string", "none") else ["parameter 1 of group 0"]
    with pytest.raises(error) as raised:
        cls([Parameter(torch.ones(2)), make()])
    for word in (*words, *named):
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"
    optimizer = _trained(cls=cls)
    with _refused(optimizer, error, *words, *(["parameter 1 of group 1"] if named else [])):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2)), make()]})
    optimizer.step()


def test_names_stand_in_the_error() -> None:
    with pytest.raises(TypeError, match=r"parameter 1 of group 0 \('position_ids'\)"):
        fused_optim.AdamW([("weight", Parameter(torch.ones(2))), ("position_ids", torch.arange(4))])


@pytest.mark.parametrize("params", [[], iter(())], ids=["list", "iterator"])
def test_no_parameters(params: Any) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        fused_optim.AdamW(params)


def test_a_tensor_instead_of_a_list() -> None:
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        fused_optim.AdamW(torch.ones(2))


def _sparse_grad(param: Tensor) -> Tensor:
    return torch.ones(param.shape, dtype=param.dtype).to_sparse()


def _give_gradient(param: Tensor, dtype: torch.dtype) -> None:
    param.grad_dtype = dtype
    param.grad = torch.ones(param.shape).to(dtype)


def _give_sparse_embedding(param: Tensor) -> None:
    torch.nn.functional.embedding(torch.tensor([1]), param, sparse=True).sum().backward()


def _give_and_reshape(param: Tensor) -> None:
    param.grad = torch.ones(param.shape)
    param.data = torch.ones(2, 4)


F32, F64, F8 = torch.float32, torch.float64, torch.float8_e4m3fn
BAD_GRADIENTS: dict[str, tuple[torch.dtype, Callable[[Tensor], Any], list[str]]] = {
    "sparse": (F32, lambda p: setattr(p, "grad", _sparse_grad(p)), ["sparse", "SparseAdam"]),
    "sparse_embedding": (F32, _give_sparse_embedding, ["sparse", "sparse=False"]),
    "float64": (F32, lambda p: _give_gradient(p, F64), ["float64", "float32", "convert"]),
    "float8": (F32, lambda p: _give_gradient(p, F8), ["float8_e4m3fn", "convert"]),
    "float32_for_float64": (F64, lambda p: _give_gradient(p, F32), ["float32", "float64", "convert"]),
    "reshaped": (F32, _give_and_reshape, ["(4, 2)", "(2, 4)"]),
}
"""What autograd or the user's own hand may leave as a gradient."""


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_bad_gradient(kind: str, cls: Any) -> None:
    """Found after a good step with a cached plan, and in a first step; the good parameter stays as well."""
    dtype, give, words = BAD_GRADIENTS[kind]
    if "float" in kind and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch cannot give a gradient another dtype than its parameter's")
    param, other, good = (
        Parameter(torch.ones(4, 2, dtype=dtype)),
        Parameter(torch.ones(4, 2, dtype=dtype)),
        Parameter(torch.ones(3)),
    )
    optimizer = _trained(param, cls=cls)
    give(param)
    with _refused(optimizer, ValueError, "parameter 1 of group 0", *words):
        optimizer.step()
    param.grad = None
    optimizer.step()
    good.grad = torch.ones(3)
    fresh = cls([good, other])
    give(other)
    with _refused(fresh, ValueError, "parameter 1 of group 0", *words):
        fresh.step()
    assert not any(fresh.state.values())


def test_a_gradient_turned_sparse_under_a_cached_plan() -> None:
    param = Parameter(torch.ones(4))
    optimizer = fused_optim.AdamW([param])
    for _ in range(2):
        param.grad = torch.ones(4)
        optimizer.step()
    param.grad = _sparse_grad(param)
    with _refused(optimizer, ValueError, "parameter 0 of group 0", "sparse"):
        optimizer.step()


STATES: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "another_dtype": (lambda t: t.half(), ["float16", "float32"]),
    "another_shape": (lambda t: t[:2].clone(), ["(2, 2)", "(3, 2)"]),
    "transposed": (lambda t: t.t().contiguous().t(), ["strides", "load_state_dict"]),
    "expanded": (lambda t: t[:1].expand(3, 2), ["strides", "load_state_dict"]),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_somebody_replaced(kind: str) -> None:
    replace, words = STATES[kind]
    good, param = Parameter(torch.ones(2)), Parameter(torch.ones(3, 2))
    optimizer = fused_optim.AdamW([good, param])
    for p in (good, param):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[param]["exp_avg_sq"] = replace(optimizer.state[param]["exp_avg_sq"])
    with _refused(optimizer, ValueError, "exp_avg_sq", "parameter 1 of group 0", *words):
        optimizer.step()


def test_a_parameter_turned_in_place_is_refused_or_right() -> None:
    """The same address and size, but other strides than the plan and the states were made for."""
    start = torch.arange(9.0).view(3, 3)
    param = Parameter(start.clone())
    optimizer = fused_optim.SGD([param], lr=1.0, momentum=0.5)
    for _ in range(2):
        param.grad = torch.zeros(3, 3)
        optimizer.step()
    param.data = param.data.t()
    param.grad = start.clone()
    try:
        optimizer.step()
    except ValueError as refused:
        assert "parameter 0 of group 0" in str(refused)
        assert torch.equal(param.data, start.t())
    else:
        assert torch.equal(param.data, start.t() - start)


def test_a_state_of_the_right_kind_may_be_replaced() -> None:
    """The plan holds addresses: it must notice that the tensor is another one."""
    param = Parameter(torch.ones(4))
    optimizer = fused_optim.SGD([param], lr=1.0, momentum=0.5)
    for _ in range(2):
        param.grad = torch.zeros(4)
        optimizer.step()
    optimizer.state[param]["momentum_buffer"] = torch.full((4,), 2.0)
    param.grad = torch.zeros(4)
    optimizer.step()
    assert param.tolist() == [0.0] * 4
    assert optimizer.state[param]["momentum_buffer"].tolist() == [1.0] * 4


@pytest.mark.parametrize("backend", ["native", "triton", "cuda"])
def test_a_backend_that_cannot_run_says_what_can(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "it is not built; build it with make"
    monkeypatch.setattr(dispatch, "_unavailable", lambda name, _: reason if name == backend else None)
    dispatch.choose.cache_clear()
    try:
        with pytest.raises(ValueError) as raised:
            fused_optim.AdamW([Parameter(torch.ones(2))], backend=backend)
    finally:
        dispatch.choose.cache_clear()
    assert backend in str(raised.value) and reason in str(raised.value)
    assert "'reference'" in str(raised.value)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_backend_without_float64(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"native.*float64.*auto"):
        cls([Parameter(torch.ones(2, dtype=torch.float64))], backend="native")


def test_auto_says_once_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        dispatch, "_unavailable", lambda name, _: "it is not built: run make" if name == "native" else None
    )
    for cached in (dispatch.choose, dispatch._log_once):
        cached.cache_clear()
    try:
        for _ in range(3):
            param = Parameter(torch.ones(2))
            param.grad = torch.ones(2)
            fused_optim.AdamW([param]).step()
    finally:
        for cached in (dispatch.choose, dispatch._log_once):
            cached.cache_clear()
    assert [r.getMessage().count("run make") for r in caplog.records] == [1]
    assert not torch.equal(param, torch.ones(2))


def test_a_closure_that_fails_changes_nothing() -> None:
    optimizer = _trained()

    def closure() -> float:
        raise KeyError("data loader")

    with _refused(optimizer, KeyError, "data loader"):
        optimizer.step(closure)
    optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_no_gradient_at_all_is_no_error(cls: Any) -> None:
    param = Parameter(torch.ones(2))
    optimizer = cls([param])
    optimizer.step()
    assert param.tolist() == [1.0, 1.0]
    assert not optimizer.state
