"""Recipes for N:M sparsity: what the model sees, step by step, beside their papers retold in plain torch."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_optim
from fused_optim import FusedOptimizer
from fused_optim.sparsity import (
    CAST,
    SRSTE,
    MaskDecay,
    MaskedDecay,
    OneShot,
    Sparsity,
    StructureDecay,
    apply_masks,
    masks_of,
)
from tests.cases import assert_same_bits, normal
from tests.oracles import recipes as retold

STEPS = 50
ROWS, WIDTH = 8, 32


def start(seed: int = 3) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).mul_(0.1)


def loss_gradient() -> Callable[[Tensor], Tensor]:
    """Of a linear regression whose inputs are correlated, so that pruned weights are missed by others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, WIDTH, generator=generator, dtype=torch.float64)
    x = x + 0.5 * x.roll(1, 1)
    y = x @ torch.randn(WIDTH, ROWS, generator=generator, dtype=torch.float64)

    def gradient(w: Tensor) -> Tensor:
        error = x @ w.detach().double().T - y
        return (error.T @ x / len(x)).float()

    return gradient


def ours(
    recipe: Sparsity, make: Callable[..., FusedOptimizer], steps: int = STEPS, **options: Any
) -> Iterator[Tensor]:
    """The same loop with an optimizer of this library."""
    w, gradient = start().requires_grad_(), loss_gradient()
    optimizer = make([w], sparsity=recipe, **options)
    apply_masks(optimizer)
    for _ in range(steps):
        yield w.detach().clone()
        w.grad = gradient(w)
        optimizer.step()
    yield w.detach().clone()


BASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (fused_optim.AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "sgd": (fused_optim.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
}
RECIPES: dict[str, tuple[Sparsity, Callable[..., Iterator[Tensor]], dict[str, Any]]] = {
    "one_shot": (OneShot(), retold.asp, {"at": 0}),
    "one_shot_later": (OneShot(at=20), retold.asp, {"at": 20}),
    "sr_ste": (SRSTE(decay=0.05), retold.sr_ste, {"decay": 0.05}),
    "sr_ste_later": (SRSTE(decay=0.05, dense_steps=20), retold.sr_ste, {"decay": 0.05, "dense": 20}),
    "sr_ste_seldom": (
        SRSTE(decay=0.05, dense_steps=10, every=8),
        retold.sr_ste,
        {"decay": 0.05, "dense": 10, "every": 8},
    ),
    "mask_decay": (
        MaskDecay(dense_steps=10, decay_steps=25),
        retold.mask_decay,
        {"dense": 10, "factor": lambda s: max(0.0, 1 - s / 25)},
    ),
    "mask_decay_exponential": (
        MaskDecay(decay_steps=40, kind="exponential", coefficient=0.1),
        retold.mask_decay,
        {"dense": 0, "factor": retold.exponential(0.1, 40)},
    ),
    "structure_decay": (
        StructureDecay(n=1, m=8, dense_steps=5, total_steps=STEPS),
        retold.structure_decay,
        {"dense": 5, "patterns": [(7, 8), (4, 8), (2, 8), (1, 8)]},
    ),
    "structure_decay_geometric": (
        StructureDecay(total_steps=STEPS, kind="geometric"),
        retold.structure_decay,
        {"dense": 0, "patterns": [(16, 32), (8, 16), (4, 8), (2, 4)]},
    ),
    "masked_decay": (
        MaskedDecay(total_steps=STEPS, decay=0.05, every=20, dense_end=0.2),
        retold.masked_decay,
        {"decay": 0.05, "every": 20, "dense_from": 40},
    ),
}


def assert_alike(actual: Iterator[Tensor], expected: Iterator[Tensor]) -> None:
    """What the model sees is the same in every step, zeros in the same places."""
    for t, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert ((a == 0) == (b == 0)).all(), f"step {t}: other weights are pruned"
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6, msg=lambda text, t=t: f"step {t}: {text}")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", RECIPES)
def test_fifty_steps_as_in_the_paper(name: str, base: str) -> None:
    recipe, loop, options = RECIPES[name]
    own, torchs, hyper = BASES[base]
    w = start().requires_grad_()
    expected = loop(w, loss_gradient(), lambda params: torchs(params, **hyper), STEPS, **options)
    assert_alike(ours(recipe, own, **hyper), expected)


@pytest.mark.parametrize("corrected", [True, False], ids=["corrected", "as_in_the_paper"])
def test_cast_as_in_the_paper(corrected: bool) -> None:
    hyper = {"lr": 0.005, "l1": 0.3}
    expected = retold.cast(
        start().requires_grad_(), loss_gradient(), STEPS, every=10, corrected=corrected, **hyper
    )
    recipe = CAST(total_steps=STEPS, every=10)
    actual = ours(recipe, fused_optim.CASTAdamS, corrects_second_moment=corrected, **hyper)
    for t, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6, msg=lambda text, t=t: f"step {t}: {text}")
    assert ((a != 0).view(-1, 4).sum(1) == 2).all()


def test_casts_first_step_is_adams() -> None:
    """Not ten times as long."""
    w, gradient = start().requires_grad_(), loss_gradient()
    optimizer = fused_optim.CASTAdamS([w], lr=0.01, sparsity=CAST(total_steps=100))
    before = w.detach().clone()
    w.grad = gradient(w)
    optimizer.step()
    moved = (w.detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=1e-6)


def _shapes() -> dict[str, Tensor]:
    """Parameters whose inputs lie next to each other in memory, and others."""
    conv = normal((8, 16, 3, 3), torch.float32, 5)
    return {
        "linear": normal((12, 32), torch.float32, 1),
        "transposed": normal((32, 12), torch.float32, 2).T,
        "slice": normal((12, 40), torch.float32, 3)[:, :32],
        "experts": normal((3, 8, 16), torch.float32, 4),
        "convolution": conv,
        "channels_last": conv.clone(memory_format=torch.channels_last),
    }


ALL_RECIPES: dict[str, Sparsity] = {
    **{name: recipe for name, (recipe, *_) in RECIPES.items()},
    "odd_groups": SRSTE(n=2, m=3, dim=0),
}
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fused_optim.AdamW, {"lr": 0.01}),
    "Adam8bit": (fused_optim.AdamW, {"lr": 0.01, "state_codec": "int8", "keep_fp32": ()}),
    "Lion": (fused_optim.Lion, {"lr": 0.01, "param_codec": "bf16_split8"}),
    "Muon": (fused_optim.Muon, {"lr": 0.01, "ns_dtype": torch.float32}),
}


def _train(
    make: Any, options: dict[str, Any], recipe: Any, steps: int, backend: str
) -> tuple[list[Tensor], Any]:
    dtype = torch.bfloat16 if "split" in options.get("param_codec", "") else torch.float32
    params = [value.detach().to(dtype).requires_grad_() for value in _shapes().values()]
    optimizer = make(params, sparsity=recipe, backend=backend, **options)
    for step in range(steps):
        for index, param in enumerate(params):
            param.grad = normal(param.shape, dtype, 100 * index + step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("name", ["one_shot", "sr_ste", "masked_decay", "odd_groups"])
@pytest.mark.parametrize("cls", CLASSES)
def test_any_class_storage_and_layout(cls: str, name: str) -> None:
    """The best backend here gives the reference's bits; what is pruned is zero in every plane."""
    make, options = CLASSES[cls]
    recipe = ALL_RECIPES[name]
    params, optimizer = _train(make, options, recipe, 4, "auto")
    expected, other = _train(make, options, recipe, 4, "reference")
    masks = masks_of(optimizer)
    for label, param, reference in zip(_shapes(), params, expected, strict=True):
        assert_same_bits(param, reference, label)
        for key, value in optimizer.state[param].items():
            assert_same_bits(value, other.state[reference][key], f"{label}: {key}")
        if "mask" not in optimizer.state[param]:
            assert label != "linear"
            continue
        mask = masks[optimizer._name(0, list(_shapes()).index(label))]
        assert mask.shape == param.shape and (param[~mask] == 0).all() and 0 < mask.float().mean() < 1
        if name == "masked_decay":
            assert (mask.unfold(-1, 4, 4).sum(-1) == 2).all() and (mask.unfold(-2, 4, 4).sum(-1) == 2).all()
        else:
            dim = recipe.dim if recipe.dim is not None else 1 if param.ndim > 3 else param.ndim - 1
            assert (mask.unfold(dim, recipe.m, recipe.m).sum(-1) == recipe.n).all()


@pytest.mark.parametrize("name", ALL_RECIPES)
def test_resuming_at_any_step_changes_nothing(name: str) -> None:
    """State dicts carry masks, dense weights and the schedule's position through every boundary."""
    recipe, gradient = ALL_RECIPES[name], loss_gradient()
    recipe = StructureDecay(total_steps=8, kind=recipe.kind) if isinstance(recipe, StructureDecay) else recipe
    options = {"lr": 0.01, "sparsity": recipe}
    w, saved = start().requires_grad_(), []
    optimizer = fused_optim.AdamW([w], **options)
    for _ in range(10):
        w.grad = gradient(w)
        optimizer.step()
        file = io.BytesIO()
        torch.save({"model": w.detach(), "optimizer": optimizer.state_dict()}, file)
        saved.append(file.getvalue())
    for step in range(len(saved) - 1):
        checkpoint = torch.load(io.BytesIO(saved[step]), weights_only=True)
        resumed = checkpoint["model"].clone().requires_grad_()
        again = fused_optim.AdamW([resumed], **options)
        again.load_state_dict(checkpoint["optimizer"])
        resumed.grad = gradient(resumed)
        again.step()
        expected = torch.load(io.BytesIO(saved[step + 1]), weights_only=True)
        assert_same_bits(resumed, expected["model"], f"step {step + 2}")
        for key, value in again.state_dict()["state"][0].items():
            assert_same_bits(value, expected["optimizer"]["state"][0][key], f"step {step + 2}: {key}")
