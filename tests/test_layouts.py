"""Every memory layout: equal to the same update on contiguous clones, or refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_optim
from tests import cases
from tests.cases import Target, assert_same_bits, normal

View = Callable[[Tensor], Tensor]

LAYOUTS: dict[str, tuple[tuple[int, ...], View]] = {
    "contiguous": ((7, 5), lambda base: base),
    "transposed": ((7, 5), lambda base: base.t()),
    "channels_last": ((2, 4, 5, 3), lambda base: base.permute(0, 3, 1, 2)),
    "channels_last_3d": ((2, 2, 4, 5, 3), lambda base: base.permute(0, 4, 1, 2, 3)),
    "permuted_5d": ((2, 3, 4, 3, 2), lambda base: base.permute(3, 1, 4, 0, 2)),
    "rows": ((9, 6), lambda base: base[2:6]),
    "columns": ((9, 8), lambda base: base[:, 1:5]),
    "one_column": ((9, 8), lambda base: base[:, 3]),
    "every_third": ((40,), lambda base: base[1::3]),
    "every_second_row_third_column": ((12, 10), lambda base: base[::2, ::3]),
    "block_of_a_transposed": ((11, 9), lambda base: base.t()[2:7, 3:9]),
    "offset_by_one": ((259,), lambda base: base[1:]),
    "diagonal": ((8, 8), lambda base: base.diagonal()),
    "scalar_of_a_vector": ((5,), lambda base: base[2]),
    "dims_of_one": ((6, 3), lambda base: base.as_strided((1, 6, 1, 3), (77, 3, 5, 1))),
    "eight_dims": ((2,) * 8 + (2,), lambda base: base[..., 0].permute(7, 0, 3, 5, 1, 6, 2, 4)),
    "across_tiles": ((9, 520), lambda base: base[:, 5:517]),
}
"""Shape of the memory, and the view of it that is the parameter."""


def _dense(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return normal(shape, dtype, seed)


def _reversed_dims(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return normal(shape[::-1], dtype, seed).permute(tuple(reversed(range(len(shape)))))


def _inside_larger(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    larger = normal(tuple(size + 2 for size in shape), dtype, seed)
    return larger[tuple(slice(1, -1) for _ in shape)]


def _expanded(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return normal((), dtype, seed).expand(shape)


def _expanded_rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return normal(shape[-1:], dtype, seed).expand(shape)


def _expanded_columns(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return normal((*shape[:-1], *(1 for _ in shape[-1:])), dtype, seed).expand(shape)


def _misaligned(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    numel = torch.Size(shape).numel()
    return normal(numel + 1, dtype, seed)[1:].view(shape)


def _every_second(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return normal((*shape, 2), dtype, seed)[..., 1]


GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "like_the_parameter": lambda shape, dtype, seed: _dense(shape, dtype, seed),
    "contiguous": _dense,
    "reversed_dims": _reversed_dims,
    "inside_larger": _inside_larger,
    "every_second": _every_second,
    "expanded": _expanded,
    "expanded_rows": _expanded_rows,
    "expanded_columns": _expanded_columns,
    "misaligned": _misaligned,
}
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fused_optim.AdamW, {"lr": 0.1, "amsgrad": False}),
    "AdamW-amsgrad": (fused_optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "Lion": (fused_optim.Lion, {"lr": 0.1, "weight_decay": 0.1}),
    "SGD": (fused_optim.SGD, {"lr": 1.0}),
    "SGD-momentum": (fused_optim.SGD, {"lr": 1.0, "momentum": 0.9}),
}


class Laid:
    """A parameter of a layout in the middle of memory that must not change, and its contiguous clone."""

    def __init__(self, layout: str, dtype: torch.dtype, device: str, seed: int) -> None:
        shape, view = LAYOUTS[layout]
        self.layout = layout
        self.base = normal(shape, dtype, seed).to(device)
        self.before = self.base.clone()
        self.outside = torch.ones(shape, dtype=torch.bool, device=device)
        view(self.outside).fill_(False)
        self.param = torch.nn.Parameter(view(self.base))
        assert self.param.data_ptr() == view(self.base).data_ptr()
        self.clone = torch.nn.Parameter(view(self.before).cpu().clone(memory_format=torch.contiguous_format))

    def set_gradient(self, kind: str, seed: int) -> None:
        """One gradient for both, laid out as asked for the parameter, contiguous for the clone."""
        shape, dtype = tuple(self.param.shape), self.param.dtype
        values = GRADIENTS[kind](shape, dtype, seed)
        self.clone.grad = values.clone(memory_format=torch.contiguous_format)
        if kind == "like_the_parameter":
            self.param.grad = torch.empty_like(self.param).copy_(values)
        else:
            self.param.grad = _same_layout(values, self.param.device)

    def check(self, ours: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
        assert_same_bits(self.param, self.clone, f"parameter ({self.layout})")
        moved = self.param.detach() != LAYOUTS[self.layout][1](self.before)
        assert moved.float().mean() > 0.5, f"{self.layout} hardly moved"
        for key, value in ours.state[self.param].items():
            assert_same_bits(value, expected.state[self.clone][key], f"{key} ({self.layout})")
        assert_same_bits(self.base[self.outside], self.before[self.outside], f"memory beside {self.layout}")
        assert (
            self.param._base is None or self.param.data_ptr() == LAYOUTS[self.layout][1](self.base).data_ptr()
        )


def _same_layout(values: Tensor, device: torch.device) -> Tensor:
    """The tensor itself, or on another device one of the same strides and alignment."""
    if values.device == device:
        return values
    start = values.storage_offset()
    storage = values.as_strided((values.untyped_storage().nbytes() // values.element_size(),), (1,), 0)
    return storage.to(device).as_strided(values.shape, values.stride(), start)


def _run(
    name: str, kinds: list[str], target: Target, dtype: torch.dtype, layouts: list[str] | None = None
) -> tuple[list[Laid], Any]:
    optimizer_class, options = CLASSES[name]
    laid = [Laid(layout, dtype, target.device, seed) for seed, layout in enumerate(layouts or LAYOUTS)]
    ours = optimizer_class(
        [each.param for each in laid], **options, backend=target.backend, arithmetic="exact"
    )
    expected = optimizer_class([each.clone for each in laid], **options, backend="reference")
    for step, kind in enumerate(kinds):
        for index, each in enumerate(laid):
            each.set_gradient(kind, 100 * step + index)
        ours.step()
        expected.step()
    for each in laid:
        each.check(ours, expected)
    return laid, ours


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", [cases.REFERENCE, cases.NATIVE, *cases.GPU])
def test_every_layout_with_every_gradient(name: str, kind: str, target: Target) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _run(name, [kind, kind], target, dtype)


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("AdamW", torch.float32), ("SGD-momentum", torch.bfloat16)], ids=["AdamW", "SGD"]
)
@pytest.mark.parametrize("target", [cases.INTERPRETER])
def test_every_layout_through_the_interpreter(
    name: str, dtype: torch.dtype, kind: str, target: Target
) -> None:
    few = ["transposed", "channels_last", "columns", "every_third", "scalar_of_a_vector", "across_tiles"]
    _run(name, [kind], target, dtype, list(LAYOUTS) if kind == "reversed_dims" else few)


@pytest.mark.parametrize("target", [cases.REFERENCE, *cases.TARGETS])
def test_layouts_that_change_from_step_to_step(target: Target) -> None:
    few = ["transposed", "channels_last", "columns", "offset_by_one"]
    kinds = ["contiguous", "reversed_dims", "reversed_dims", "expanded", "misaligned", "like_the_parameter"]
    _run("AdamW", kinds, target, torch.float32, few)


@pytest.mark.parametrize("target", [cases.REFERENCE, *cases.TARGETS])
def test_square_sum_of_strided_gradients(target: Target) -> None:
    """The norm counts every element of a view once, and expanded ones as often as they appear."""
    laid = [
        Laid(layout, torch.float32, target.device, 3) for layout in ("transposed", "columns", "channels_last")
    ]
    params = [each.param for each in laid]
    optimizer = fused_optim.SGD(params, lr=1.0, clip_grad_norm=1e-3, backend=target.backend)
    for each, kind in zip(laid, ("reversed_dims", "expanded", "expanded_rows"), strict=True):
        each.set_gradient(kind, 5)
    before = [param.detach().double().clone() for param in params]
    grads = [param.grad.double() for param in params if param.grad is not None]
    norm = torch.sqrt(sum(grad.square().sum() for grad in grads))
    optimizer.step()
    for param, old, grad in zip(params, before, grads, strict=True):
        expected = old - grad * 1e-3 / (norm + 1e-6)
        torch.testing.assert_close(param.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CLASSES)
def test_states_are_dense_and_follow_the_parameter(name: str) -> None:
    laid, optimizer = _run(name, ["contiguous"], Target("native", "cpu"), torch.float32)
    for each in laid:
        for key, state in optimizer.state[each.param].items():
            if key == "step":
                continue
            assert state.untyped_storage().nbytes() == state.numel() * state.element_size()
            dims = [d for d, size in enumerate(state.shape) if size > 1]
            assert sorted(dims, key=state.stride) == sorted(dims, key=each.param.stride)


def test_conjugated_and_negated_gradients() -> None:
    """``conj()`` and the imaginary part of one are lazy: their memory holds other values than they show."""
    complex_param = torch.nn.Parameter(normal(2 * 9, torch.float32, 1).view(torch.complex64))
    real_param = torch.nn.Parameter(normal(9, torch.float32, 2))
    hidden = normal(2 * 9, torch.float32, 3).view(torch.complex64)
    params, clones = (
        [complex_param, real_param],
        [p.detach().clone().requires_grad_() for p in (complex_param, real_param)],
    )
    ours = fused_optim.AdamW(params, backend="native")
    expected = fused_optim.AdamW(clones, backend="reference")
    for _ in range(3):
        complex_param.grad, real_param.grad = hidden.conj(), hidden.conj().imag
        assert complex_param.grad.is_conj() and real_param.grad.is_neg()
        clones[0].grad, clones[1].grad = hidden.conj().resolve_conj().clone(), (-hidden.imag).clone()
        ours.step()
        expected.step()
    for param, clone in zip(params, clones, strict=True):
        assert_same_bits(param, clone)
        assert_same_bits(ours.state[param]["exp_avg"], expected.state[clone]["exp_avg"])


def test_complex_views() -> None:
    base = normal(2 * 48, torch.float32, 1).view(torch.complex64).view(6, 8)
    before = base.clone()
    param = torch.nn.Parameter(base.t()[1:7, 1:5])
    clone = torch.nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    ours, expected = (
        fused_optim.AdamW([param], backend="native"),
        fused_optim.AdamW([clone], backend="reference"),
    )
    for step in range(2):
        clone.grad = normal(2 * 24, torch.float32, step).view(torch.complex64).view(6, 4)
        param.grad = clone.grad.t().contiguous().t()
        ours.step()
        expected.step()
    assert_same_bits(param, clone)
    outside = torch.ones(6, 8, dtype=torch.bool)
    outside.t()[1:7, 1:5] = False
    assert_same_bits(base[outside], before[outside])
    assert not torch.equal(base, before)


def _refuses(params: list[Tensor], message: str, *, grads: list[Tensor] | None = None) -> None:
    """A step with a good parameter beside the bad ones changes none of them."""
    good = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_optim.AdamW([good, *params], lr=0.1)
    good.grad = torch.ones(3)
    for param, grad in zip(params, grads or [torch.ones(p.shape) for p in params], strict=True):
        param.grad = grad
    before = [param.detach().clone() for param in (good, *params)]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    for param, old in zip((good, *params), before, strict=True):
        assert_same_bits(param, old)
    assert all(not state for state in optimizer.state.values())


@pytest.mark.parametrize(
    "param",
    [
        torch.zeros(3).expand(2, 3),
        torch.zeros(1).expand(4),
        torch.zeros(9).as_strided((3, 3), (2, 1)),
        torch.zeros(9).unfold(0, 3, 1),
        torch.zeros(64).as_strided((3, 4, 2), (6, 3, 4)),
    ],
    ids=["expanded", "expanded_scalar", "overlapping_rows", "sliding_windows", "interleaved_overlap"],
)
def test_a_parameter_that_overlaps_itself_is_refused(param: Tensor) -> None:
    _refuses([param.detach().requires_grad_()], r"parameter 1 of group 0.*clone")


def _two(base: Tensor, first: View, second: View) -> list[Tensor]:
    return [first(base).detach().requires_grad_(), second(base).detach().requires_grad_()]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda b: b, lambda b: b),
        (lambda b: b[:5], lambda b: b[4:]),
        (lambda b: b[:, :4], lambda b: b[:, 3:]),
        (lambda b: b[::2], lambda b: b[2]),
        (lambda b: b, lambda b: b.t()),
        (lambda b: b[0], lambda b: b[:1].view(torch.bfloat16)),
    ],
    ids=["same", "rows", "columns", "row_of_every_second", "transposed", "other_dtype"],
)
def test_parameters_that_share_memory_are_refused(first: View, second: View) -> None:
    pair = _two(torch.ones(8, 8), first, second)
    grads = [torch.ones(p.shape, dtype=p.dtype) for p in pair]
    _refuses(pair, r"parameter 1 of group 0 and parameter 2 of group 0 share memory.*once", grads=grads)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda b: b[::2], lambda b: b[1::2]),
        (lambda b: b[:, ::2], lambda b: b[:, 1::2]),
        (lambda b: b[:, :4], lambda b: b[:, 4:]),
        (lambda b: b[:4], lambda b: b[4:]),
        (lambda b: b.t()[:3], lambda b: b[:, 3:]),
    ],
    ids=["rows", "columns", "halves_of_rows", "halves", "transposed_and_not"],
)
def test_disjoint_views_of_one_memory_are_accepted(first: View, second: View) -> None:
    base = normal((8, 8), torch.float32, 1)
    pair = _two(base, first, second)
    clones = [p.detach().clone().requires_grad_() for p in pair]
    ours, expected = fused_optim.AdamW(pair, backend="native"), fused_optim.AdamW(clones, backend="reference")
    for step in range(2):
        for index, (param, clone) in enumerate(zip(pair, clones, strict=True)):
            clone.grad = normal(tuple(param.shape), torch.float32, 10 * step + index)
            param.grad = clone.grad.clone()
        ours.step()
        expected.step()
    for param, clone in zip(pair, clones, strict=True):
        assert_same_bits(param, clone)


def test_a_gradient_may_be_the_parameter_itself() -> None:
    """The gradient of p**2 / 2 is p; a rule reads an element before it writes it."""
    start = normal(100, torch.float32, 1)
    param = torch.nn.Parameter(start.clone())
    param.grad = param.detach()
    fused_optim.SGD([param], lr=0.25, backend="native").step()
    assert_same_bits(param, start - 0.25 * start)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_gradient_in_the_memory_of_another_element_is_read_first_or_refused(backend: str) -> None:
    start = normal((40, 40), torch.float32, 1)
    param = torch.nn.Parameter(start.clone())
    param.grad = param.detach().t()
    optimizer = fused_optim.SGD([param], lr=0.25, backend=backend)
    try:
        optimizer.step()
    except ValueError as refused:
        assert "parameter 0 of group 0" in str(refused)
        assert_same_bits(param, start)
    else:
        assert_same_bits(param, start - 0.25 * start.t())


def test_tied_gradients_are_fine() -> None:
    """Two parameters may read one gradient."""
    params = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.zeros(5))]
    grad = normal(5, torch.float32, 1)
    for param in params:
        param.grad = grad
    fused_optim.SGD(params, lr=1.0, backend="native").step()
    assert_same_bits(params[0], 1 - grad)
    assert_same_bits(params[1], 0 - grad)
