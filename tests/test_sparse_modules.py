"""Masked forward passes, learned scales of weights and distillation: values and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import fused_optim
from fused_optim.sparsity import (
    MagnitudeMask,
    OneShot,
    WeightScale,
    check_mask,
    distillation_loss,
    mask_forward,
    masks_of,
    nm_mask,
    prune,
    unmask_forward,
)


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_linear(dtype: torch.dtype, scale: float) -> None:
    layer = nn.Linear(16, 6).to(dtype)
    dense = layer.weight
    w = dense.detach().clone()
    assert isinstance(mask_forward(layer, n=1, m=4, scale=scale), MagnitudeMask)
    expected = torch.where(nm_mask(w, 1, 4), w, w * scale)
    assert torch.equal(layer.weight, expected)
    assert layer.parametrizations.weight.original is dense and torch.equal(dense, w)
    x, seen = torch.randn(5, 16, dtype=dtype), torch.randn(5, 6, dtype=dtype)
    layer(x).backward(seen)
    free = expected.clone().requires_grad_()
    functional.linear(x, free, layer.bias).backward(seen)
    assert dense.grad is not None and free.grad is not None
    assert torch.equal(dense.grad, free.grad)


def test_pruned_infinities_are_zero() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[torch.inf, torch.nan, -torch.inf, 1.0]])
    mask_forward(layer, n=1)
    assert layer.weight.isnan().tolist() == [[False, True, False, False]]
    assert layer.weight[0, [0, 2, 3]].tolist() == [0.0, 0.0, 0.0]


def test_masks_follow_weights_and_scales_follow_a_schedule() -> None:
    layer = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    mask = mask_forward(layer, dim=1)
    assert check_mask(layer.weight, dim=1)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(4, 8, 3, 3))
    original = layer.parametrizations.weight.original
    assert torch.equal(layer.weight, original * nm_mask(original, dim=1))
    mask.scale = 0.5
    assert torch.equal(layer.weight, original * torch.where(nm_mask(original, dim=1), 1.0, 0.5))
    assert "2:4, dim=1, scale=0.5" in repr(layer)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("width", [3, 4])
def test_convolutions_have_the_masks_that_pruning_and_recipes_find(
    width: int, memory_format: torch.memory_format
) -> None:
    layer = nn.Conv2d(8, 4, width).to(memory_format=memory_format)
    pruned, trained = copy.deepcopy(layer), copy.deepcopy(layer)
    mask_forward(layer)
    assert prune(pruned) == ["weight"]
    optimizer = fused_optim.SGD(trained.named_parameters(), lr=0.0, sparsity=OneShot())
    trained.weight.grad = torch.zeros_like(trained.weight)
    optimizer.step()
    for other in (pruned, trained):
        assert torch.equal(layer.weight, other.weight)
    assert torch.equal(masks_of(optimizer)["weight"], layer.weight != 0)
    alone = MagnitudeMask()(layer.parametrizations.weight.original)
    assert torch.equal(alone, pruned.weight)


@pytest.mark.parametrize("leave", [True, False])
def test_unmasking(leave: bool) -> None:
    layer = nn.Linear(8, 8)
    dense, place = layer.weight, layer.weight.data_ptr()
    w = dense.detach().clone()
    mask_forward(layer)
    assert unmask_forward(layer, leave_parametrized=leave) is layer
    assert layer.weight is dense and dense.data_ptr() == place and type(layer) is nn.Linear
    assert torch.equal(layer.weight, w * nm_mask(w) if leave else w)


def test_assigned_weights_are_dense_ones() -> None:
    layer = nn.Linear(8, 8)
    mask_forward(layer)
    w = torch.randn(8, 8)
    layer.weight = w
    assert torch.equal(layer.parametrizations.weight.original, w) and check_mask(layer.weight)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)


def test_sr_ste_with_any_optimizer() -> None:
    """Dense weights are trained, what the layer computes with is sparse at every step."""
    layer = nn.Linear(16, 4)
    mask_forward(layer)
    optimizer = fused_optim.AdamW(layer.parameters(), lr=0.1)
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert check_mask(layer.weight)
    assert losses[-1] < 0.7 * losses[0]
    assert layer.parametrizations.weight.original.count_nonzero() == 64


def _scaled(w: Tensor, scales: Tensor) -> Tensor:
    columns = torch.arange(w.shape[1]) // (w.shape[1] // scales.shape[1])
    return w * scales[:, columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_weights(dtype: torch.dtype) -> None:
    layer = nn.Linear(24, 6).to(dtype)
    dense = layer.weight
    with torch.no_grad():
        dense.mul_(nm_mask(dense))
    w = dense.detach().clone()
    scale = WeightScale.attach(layer, parts=3)
    assert torch.equal(layer.weight, w) and scale.A.shape == (6, 3) and scale.A.dtype == torch.float32
    with torch.no_grad():
        scale.A.copy_(torch.rand(6, 3) + 0.5)
    expected = _scaled(w.float(), scale.A).to(dtype)
    assert torch.equal(layer.weight, expected)
    layer(torch.ones(2, 24, dtype=dtype)).sum().backward()
    assert dense.grad is not None and scale.A.grad is not None
    torch.testing.assert_close(scale.A.grad, 2 * w.float().unflatten(1, (3, 8)).sum(2), rtol=1e-2, atol=1e-2)
    assert WeightScale.fold(layer) is layer and layer.weight is dense
    assert torch.equal(layer.weight, expected) and check_mask(layer.weight)
    assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]


def test_distillation_by_definition() -> None:
    student, teacher = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    labels = torch.randint(7, (2, 5))
    labels[0, 1] = labels[1, 4] = -100
    eta, temperature = 0.3, 2.0
    loss = distillation_loss(student, teacher, labels, eta, temperature)
    total = 0.0
    for s, t, label in zip(student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten(), strict=True):
        if label == -100:
            continue
        p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
        total += eta * (p * (p / q).log()).sum() - (1 - eta) * s.softmax(-1)[label].log()
    torch.testing.assert_close(loss, torch.as_tensor(total / 8))
    (gradient,) = torch.autograd.grad(loss, student)
    (expected,) = torch.autograd.grad(torch.as_tensor(total / 8), student)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[0, 1] == 0).all()


def test_distillation_at_its_ends() -> None:
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    labels = torch.randint(9, (6,))
    cross_entropy = functional.cross_entropy(student, labels)
    torch.testing.assert_close(distillation_loss(student, teacher, labels, eta=0.0), cross_entropy)
    torch.testing.assert_close(
        distillation_loss(student, student, labels), 2 / 3 * cross_entropy, rtol=1e-6, atol=1e-6
    )
    none = torch.full((6,), -100)
    assert distillation_loss(student, teacher, none).item() == 0.0
    never = torch.zeros(6, 9).index_fill(1, torch.tensor([3]), -torch.inf).requires_grad_()
    loss = distillation_loss(never, never.detach(), labels.masked_fill(labels == 3, 4))
    loss.backward()
    assert loss.isfinite() and never.grad is not None and never.grad.isfinite().all()
    assert distillation_loss(student.bfloat16(), teacher.bfloat16(), labels).dtype == torch.float32


class _Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda layer: mask_forward(layer, n=4), ValueError, "n=4, m=4"),
        (lambda layer: mask_forward(layer, m=5), ValueError, "no multiple of m=5"),
        (
            lambda layer: mask_forward(layer, "kernel"),
            ValueError,
            "has no parameter 'kernel'; it has weight, bias",
        ),
        (lambda layer: mask_forward(layer, scale=1.5), ValueError, "scale=1.5"),
        (lambda layer: mask_forward(layer, scale="half"), TypeError, "scale must be a number"),
        (lambda layer: [mask_forward(layer), mask_forward(layer)], ValueError, "masked already"),
        (lambda layer: unmask_forward(layer), ValueError, "has no MagnitudeMask; mask_forward makes one"),
        (lambda layer: WeightScale.fold(layer), ValueError, "has no WeightScale"),
        (lambda layer: WeightScale.attach(layer, parts=3), ValueError, "a multiple of 12"),
        (lambda layer: WeightScale.attach(layer, parts=4), ValueError, "a multiple of 16"),
        (lambda layer: WeightScale.attach(layer, "bias"), ValueError, "no rows of 2 parts"),
        (lambda layer: WeightScale.attach(layer, parts=0), ValueError, "parts=0"),
        (lambda layer: WeightScale.attach(layer, m=2.0), TypeError, "m must be an integer"),
        (lambda layer: [WeightScale.attach(layer), WeightScale.attach(layer)], ValueError, "scaled already"),
        (lambda layer: WeightScale(torch.ones(4, 8, dtype=torch.int8)), TypeError, "int8"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(nn.Linear(8, 3))


def test_parametrizations_that_depend_on_each_other_stay() -> None:
    layer = nn.Linear(8, 3)
    mask_forward(layer)
    parametrize.register_parametrization(layer, "weight", _Doubled())
    with pytest.raises(ValueError, match="MagnitudeMask, _Doubled"):
        unmask_forward(layer)
    assert parametrize.is_parametrized(layer, "weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_logits": torch.zeros(2, 4)}, "do not belong together"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels \(3,\)"),
        ({"eta": 1.1}, "eta=1.1"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_wrong_arguments_of_the_loss(change: dict[str, Any], message: str) -> None:
    given = {"student_logits": torch.zeros(2, 5), "teacher_logits": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{**given, "labels": torch.zeros(2, dtype=torch.long), **change})
