"""A step that uses its plan again: what must be noticed, and what torch does around every step."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fused_optim
from fused_optim import storage
from fused_optim.kernels import guards
from fused_optim.kernels.aliasing import Occupied, Written
from fused_optim.kernels.readers import Reader
from tests.cases import assert_same_bits, normal

RANGE = "Optimizer.step#AdamW.step"


def _optimizer(count: int = 3, size: int = 4) -> tuple[Any, list[Parameter]]:
    params = [Parameter(normal((size,), torch.float32, i)) for i in range(count)]
    return fused_optim.AdamW(params, lr=0.1), params


def _step(optimizer: Any, params: list[Parameter], number: int) -> None:
    for index, param in enumerate(params):
        param.grad = normal(tuple(param.shape), torch.float32, 10 * number + index)
    optimizer.step()


def _replace_equal(optimizer: Any, param: Parameter) -> None:
    """A comparison of values would take the copies for the tensors themselves."""
    state = optimizer.state[param]
    for key in state:
        state[key] = state[key].clone()


def _replace_entry(optimizer: Any, param: Parameter) -> None:
    optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}


def _replace_all(optimizer: Any, param: Parameter) -> None:
    optimizer.state = defaultdict(dict, {p: dict(state) for p, state in optimizer.state.items()})
    _replace_entry(optimizer, param)


def _update(optimizer: Any, param: Parameter) -> None:
    optimizer.state[param].update(exp_avg=optimizer.state[param]["exp_avg"].clone())


def _move_all(optimizer: Any, param: Parameter) -> None:
    """What scripts do that move an optimizer to another device."""
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


CHANGES: list[Callable[[Any, Parameter], None]] = [
    _replace_equal,
    _replace_entry,
    _replace_all,
    _update,
    _move_all,
]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_states_replaced_by_equal_ones(change: Callable[[Any, Parameter], None], size: int) -> None:
    """The update goes into the tensors that the optimizer shows, with the bits of an undisturbed one."""
    (changed, params), (still, others) = _optimizer(size=size), _optimizer(size=size)
    for number in range(2):
        _step(changed, params, number)
        _step(still, others, number)
    change(changed, params[1])
    for number in range(2, 4):
        _step(changed, params, number)
        _step(still, others, number)
    for param, other in zip(params, others, strict=True):
        assert_same_bits(param, other)
        for key, value in still.state[other].items():
            assert_same_bits(changed.state[param][key], value, key)


@pytest.mark.parametrize("kind", [guards.PythonDictGuards, guards.NativeDictGuards])
def test_dictionaries_that_change(kind: Any) -> None:
    one, other = torch.ones(()), torch.ones(())
    changes: list[Callable[[dict[str, Tensor]], Any]] = [
        lambda d: d.update(a=other),
        lambda d: d.pop("a"),
        lambda d: d.update(b=one),
        lambda d: d.clear(),
        lambda d: d.update(b=d.pop("a")),
    ]
    for change in changes:
        dicts = [{"a": one}, {"a": one}]
        guard = kind(dicts)
        assert guard.check() and guard.check()
        dicts[0]["a"] = one
        assert guard.check()
        change(dicts[1])
        assert not guard.check() and not guard.check()


@pytest.mark.parametrize("kind", [guards.PythonGuards, guards.Guards])
def test_tensors_that_change(kind: Any) -> None:
    tensors = [torch.ones(2, 2), torch.ones(3)]
    guard = kind(tensors)
    assert guard.check(list(map(torch.clone, tensors)))
    others = [torch.ones(4), torch.ones(2, 2).double(), torch.ones(2, 2).to_sparse(), torch.ones(4, 2)[::2]]
    for other in [*others, torch.ones(2, 2)._neg_view(), Parameter(torch.ones(2, 2)), None]:
        assert not guard.check([other, tensors[1]])


def test_without_torch_s_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that moved its private comparisons costs time, no bits."""
    fast, params = _optimizer()
    slow, others = _optimizer()
    monkeypatch.setattr("fused_optim.kernels.readers.Guards", guards.PythonGuards)
    monkeypatch.setattr("fused_optim.optimizer.NativeDictGuards", guards.PythonDictGuards)
    for number in range(3):
        _step(slow, others, number)
    monkeypatch.undo()
    for number in range(3):
        _step(fast, params, number)
    for param, other in zip(params, others, strict=True):
        assert_same_bits(param, other)


def _readers(tensors: Sequence[Parameter]) -> Reader:
    for index, tensor in enumerate(tensors):
        tensor.grad = torch.full_like(tensor, float(index))
    return Reader(tensors, storage.local_view)


def _read(reader: Reader, in_c: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        if not in_c:
            patch.setattr(reader, "_in_c", None)
        return reader.read()


PARAMETER_CHANGES: dict[str, Callable[[Parameter], Any]] = {
    "memory": lambda p: setattr(p, "data", p.data.clone()),
    "strides": lambda p: setattr(p, "data", p.data.t()),
    "shape": lambda p: setattr(p, "data", p.data.view(4)),
    "dims": lambda p: setattr(p, "data", p.data.view(2, 2, 1)),
    "no_gradient": lambda p: setattr(p, "grad", None),
    "strided_gradient": lambda p: setattr(p, "grad", torch.ones(2, 4)[:, ::2]),
    "sparse_gradient": lambda p: setattr(p, "grad", torch.ones(2, 2).to_sparse()),
}


@pytest.mark.parametrize("in_c", [True, False], ids=["in_c", "in_python"])
@pytest.mark.parametrize("change", PARAMETER_CHANGES)
def test_parameters_and_gradients_that_change(
    change: str, in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [Parameter(torch.ones(2, 2)), Parameter(torch.ones(3))]
    reader = _readers(params)
    assert reader._in_c is not None or not hasattr(Tensor, "__dlpack_c_exchange_api__")
    assert _read(reader, in_c, monkeypatch) is not None
    for param in params:
        param.grad = param.detach() * 5
    grads, addresses = _read(reader, in_c, monkeypatch)
    assert all(grad is param.grad for grad, param in zip(grads, params, strict=True))
    assert addresses.tolist() == [param.grad.data_ptr() for param in params if param.grad is not None]
    PARAMETER_CHANGES[change](params[0])
    assert _read(reader, in_c, monkeypatch) is None


@pytest.mark.parametrize("in_c", [True, False], ids=["in_c", "in_python"])
def test_negated_gradients(in_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """DLPack does not tell them apart from what their memory holds."""
    params = [Parameter(torch.ones(())), Parameter(torch.ones(3))]
    reader = _readers(params)
    params[0].grad = torch.tensor(1 + 5j).conj().imag
    assert params[0].grad.is_neg() and params[0].grad.stride() == ()
    (grad, _), addresses = _read(reader, in_c, monkeypatch)
    assert not grad.is_neg() and grad == -5 and addresses[0] == grad.data_ptr()


@pytest.mark.parametrize("in_c", [True, False], ids=["in_c", "in_python"])
def test_lists_of_the_same_objects(in_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_c:
        monkeypatch.setattr(guards, "objects", lambda: None)
    elif guards.objects() is None:
        pytest.skip("the CPU library was not built")
    one, other = torch.ones(()), torch.ones(())
    assert guards.same_objects([one, other], [one, other]) and guards.same_objects([], [])
    assert guards.same_objects((one,), [one])
    for wrong in ([other, one], [one], [one, other, one], [one, torch.ones(())]):
        assert not guards.same_objects([one, other], wrong)


def test_entries_keep_their_order() -> None:
    dicts: list[dict[str, Any]] = [{"a": 1, "b": 2}, {}, {"c": 3}]
    for kind in (guards.PythonDictGuards, guards.NativeDictGuards):
        guard = kind(dicts)
        assert guard.check()
        moved = dicts[0].pop("a")
        dicts[0]["a"] = moved
        assert not guard.check()
        dicts[0]["b"] = dicts[0].pop("b")
        assert guard.check()


def test_where_gradients_lie() -> None:
    """The search among the edges of written memory finds what a comparison of all pairs finds."""
    rng = np.random.default_rng(3)
    memory = torch.zeros(4000, dtype=torch.uint8)
    for _ in range(60):
        starts, sizes = rng.integers(0, 3900, 12).tolist(), rng.integers(1, 90, 12).tolist()
        spans = [memory[a : a + n] for a, n in zip(starts, sizes, strict=True)]
        occupied = Occupied(Written(span, span, False) for span in spans)
        for first, extent in zip(*rng.integers(1, (3900, 99), (50, 2)).T.tolist(), strict=True):
            expected = any(a < first + extent and first < a + n for a, n in zip(starts, sizes, strict=True))
            address = np.array([memory.data_ptr() + first])
            assert occupied.may_hold(address, np.array([extent])) == expected
    assert not Occupied([]).may_hold(np.array([64]), np.array([4]))


def _profiled(optimizer: Any) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    return [event.key for event in profile.key_averages()]


def _legacy_profiled(optimizer: Any) -> list[str]:
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    return [event.key for event in profile.key_averages()]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize("profiled", [_profiled, _legacy_profiled])
def test_a_profiler_sees_the_step(profiled: Callable[[Any], list[str]]) -> None:
    optimizer, params = _optimizer()
    _step(optimizer, params, 0)
    assert RANGE in profiled(optimizer)
    optimizer.step()
    assert RANGE in profiled(optimizer)
    assert optimizer.state[params[0]]["step"].item() == 4


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """What hooks for all optimizers see, besides those of one optimizer."""
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("all pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all post")),
    ]
    yield seen
    for handle in handles:
        handle.remove()


def test_hooks_of_all_optimizers(seen: list[str]) -> None:
    optimizer, params = _optimizer()
    _step(optimizer, params, 0)
    assert seen == ["all pre", "all post"]
    optimizer.register_step_pre_hook(lambda *_: seen.append("own pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("own post"))
    seen.clear()
    optimizer.step()
    assert seen == ["all pre", "own pre", "own post", "all post"]


def test_a_hook_may_change_the_arguments() -> None:
    optimizer, params = _optimizer()
    _step(optimizer, params, 0)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: torch.tensor(7.0)), {}))
    assert optimizer.step() == 7.0


def _pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("again", [copy.deepcopy, _pickled])
def test_copies_step_and_have_hooks(again: Callable[[Any], Any]) -> None:
    optimizer, params = _optimizer()
    _step(optimizer, params, 0)
    copied = again(optimizer)
    others = copied.param_groups[0]["params"]
    calls: list[int] = []
    copied.register_step_post_hook(lambda *_: calls.append(1))
    _step(optimizer, params, 1)
    _step(copied, others, 1)
    assert calls == [1]
    for param, other in zip(params, others, strict=True):
        assert_same_bits(param, other)
