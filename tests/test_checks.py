"""What is refused before a step: options that were set later, tensors that no step can change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim.kernels.triton import driver as triton_driver
from tests.cases import assert_same_bits, normal
from tests.test_errors import _refused, _trained

LATE: list[dict[str, Any]] = [
    {"state_codec": "int9"},
    {"state_codec": {"exp_avg": "int9"}},
    {"param_codec": "int9"},
    {"keep_fp32": None},
    {"backend": "foo"},
    {"arithmetic": "sloppy"},
    {"spectral": "x"},
    {"sparsity": "x"},
    {"clip_grad_norm": "x"},
    {"lr": "x"},
    {"lr": None},
    {"lr": torch.ones(2)},
    {"lr": torch.tensor(1j)},
    {"betas": 0.9},
    {"betas": (0.9, "x")},
    {"eps": "x"},
    {"weight_decay": "x"},
]


def _complaint(options: dict[str, Any], cls: Any = fused_optim.AdamW) -> tuple[type[Exception], str]:
    """What the constructor says to an option."""
    with pytest.raises((TypeError, ValueError)) as raised:
        cls([Parameter(torch.ones(2, 2))], **options)
    return raised.type, str(raised.value)


@pytest.mark.parametrize("options", LATE, ids=str)
def test_an_option_set_later_is_refused_as_by_the_constructor(options: dict[str, Any]) -> None:
    error, text = _complaint(options)
    optimizer = _trained()
    group = optimizer.param_groups[0]
    known = {key: group[key] for key in options}
    group.update(options)
    with _refused(optimizer, error, text):
        optimizer.step()
    group.update(known)
    optimizer.step()


@pytest.mark.parametrize("options", LATE, ids=str)
def test_an_option_set_before_the_first_step_leaves_no_states_behind(options: dict[str, Any]) -> None:
    error, text = _complaint(options)
    param = Parameter(torch.ones(3))
    optimizer = fused_optim.AdamW([param])
    param.grad = torch.ones(3)
    optimizer.param_groups[0].update(options)
    with _refused(optimizer, error, text):
        optimizer.step()
    assert not optimizer.state


def test_an_algorithm_set_later_is_refused_as_by_the_constructor() -> None:
    param = Parameter(torch.eye(3))
    optimizer = fused_optim.Muon([param])
    for algorithm in ("muon", "adam"):
        param.grad = torch.eye(3)
        optimizer.param_groups[0]["algorithm"] = algorithm
        if algorithm == "muon":
            optimizer.step()
            continue
        with _refused(optimizer, ValueError, "algorithm='adam'", "adamw"):
            optimizer.step()


@pytest.mark.parametrize("lr", [-0.1, torch.tensor(-0.1)], ids=["float", "tensor"])
def test_a_schedule_may_leave_the_range_of_a_number(lr: Any) -> None:
    """As in torch, and whether or not the launches are planned anew in that step."""
    results = []
    for cls in (fused_optim.SGD, torch.optim.SGD):
        params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
        optimizer = cls(params, lr=0.5)
        for step in range(3):
            params[0].grad = torch.ones(3)
            params[1].grad = torch.ones(2) if step == 2 else None
            optimizer.step()
            optimizer.param_groups[0]["lr"] = lr
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results)


def _reversed(tensor: Tensor) -> Tensor:
    """The same values, the first dimension innermost in memory."""
    order = list(range(tensor.ndim))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def _gapped(tensor: Tensor) -> Tensor:
    """The same values with a gap after every row of every dimension."""
    wide = torch.zeros([size + 1 for size in tensor.shape], dtype=tensor.dtype)
    out = wide[tuple(slice(0, size) for size in tensor.shape)]
    return out.copy_(tensor)


MANY: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int, torch.dtype]] = {
    "parameter": (_gapped, Tensor.clone, 9, torch.float32),
    "gradient": (Tensor.clone, _reversed, 9, torch.float32),
    "complex": (_gapped, _reversed, 8, torch.complex64),
}
"""How a parameter and its gradient lie in memory in nine dimensions, none of which can be merged."""


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", MANY)
def test_tensors_of_nine_dimensions_that_cannot_be_merged(
    kind: str, backend: str, clip: float | None
) -> None:
    place, lay, ndim, dtype = MANY[kind]
    start = normal((2,) * ndim, dtype, seed=1)
    params = [Parameter(place(start)), Parameter(start.clone())]
    optimizers = [
        fused_optim.AdamW([p], lr=0.1, backend=each, clip_grad_norm=clip)
        for p, each in zip(params, (backend, "reference"), strict=True)
    ]
    for step in range(3):
        gradient = normal((2,) * ndim, dtype, seed=2 + step)
        params[0].grad, params[1].grad = lay(gradient), gradient
        for optimizer in optimizers:
            optimizer.step()
    if clip is None:
        assert_same_bits(params[0].detach().clone().contiguous(), params[1].detach(), kind)
    torch.testing.assert_close(params[0], params[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MANY)
def test_a_named_backend_refuses_nine_dimensions_before_there_are_states(kind: str) -> None:
    place, lay, ndim, dtype = MANY[kind]
    param = Parameter(place(torch.ones((2,) * ndim, dtype=dtype)))
    optimizer = fused_optim.AdamW([("weight", param)], backend="native")
    param.grad = lay(torch.ones((2,) * ndim, dtype=dtype))
    with _refused(optimizer, ValueError, "'weight'", "9 dimensions", "8", "native", "contiguous"):
        optimizer.step()
    assert not optimizer.state


def test_a_parameter_on_the_meta_device_is_refused_by_step_until_it_has_memory() -> None:
    """FSDP2's to_empty fills DTensors in place, so that an optimizer may be made before it."""
    param = Parameter(torch.ones(3, device="meta"))
    optimizer = fused_optim.AdamW([("weight", param)], lr=0.1)
    param.grad = torch.ones(3, device="meta")
    with pytest.raises(TypeError, match=r"'weight'.*meta.*to_empty") as raised:
        optimizer.step()
    assert "share" not in str(raised.value) and not optimizer.state
    param.grad = None
    torch.utils.swap_tensors(param, Parameter(torch.ones(3)))
    param.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.899))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_parameter_is_refused_by_the_constructor(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    with pytest.raises(TypeError, match=r"parameter 1 of group 0.*dense"):
        fused_optim.AdamW([Parameter(torch.ones(2)), Parameter(nested)])


@pytest.mark.parametrize("make", [iter, tuple, lambda params: dict(enumerate(params)).values()])
def test_a_group_with_any_iterable_names_the_parameter_that_is_not_a_leaf(make: Any) -> None:
    """Torch's message alone has neither the parameter nor the remedy."""
    params = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True) * 2]
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*detach"):
        fused_optim.AdamW([{"params": make(params)}])
    group = {"params": make(params[:1])}
    assert fused_optim.AdamW([group]).param_groups[0] is group


@pytest.mark.parametrize("cls", [fused_optim.Muon, fused_optim.NorMuon, fused_optim.AdamW8bit])
def test_the_options_that_a_message_lists_are_those_of_the_constructor(cls: Any) -> None:
    own = "others_lr" if issubclass(cls, fused_optim.Muon) else "amsgrad"
    error, text = _complaint({"betta2": 0.9, "lr": 0.1}, cls)
    assert error is TypeError and all(f"'{name}'" in text for name in ("betta2", "lr", "seed", own))
    assert "params" not in text and "self" not in text and "decoupled_weight_decay" not in text


def test_a_message_does_not_offer_what_it_refuses() -> None:
    _, text = _complaint({"differentiable": True}, fused_optim.Muon)
    assert text.startswith("Muon does not know the options ['differentiable']")
    assert text.count("differentiable") == 1


def test_full_precision_of_another_librarys_optimizer_is_refused() -> None:
    param = Parameter(torch.ones(2))
    optimizer: Any = torch.optim.AdamW([param])
    for call in (
        lambda: fused_optim.full_precision(optimizer, param),
        lambda: fused_optim.set_full_precision(optimizer, param, torch.zeros(2)),
    ):
        with pytest.raises(TypeError, match=r"torch\.optim\.adamw\.AdamW.*fused_optim.*state\[param\]"):
            call()
    assert param.tolist() == [1.0, 1.0]


def test_triton_says_what_to_do_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    reason = triton_driver.unavailable("cuda")
    assert reason is not None and "install a CUDA build of torch" in reason
