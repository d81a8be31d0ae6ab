"""Flip rates against masks found and counted in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fused_optim
from fused_optim import SGD, AdamW
from fused_optim.kernels.layout import memory_order
from fused_optim.sparsity import (
    SRSTE,
    FlipRate,
    MaskedDecay,
    OneShot,
    StructureDecay,
    apply_masks,
    report,
)
from tests.cases import normal
from tests.oracles import masks as oracle

Mask = np.ndarray
Find = Callable[[np.ndarray], Mask]


def groups_of(n: int, m: int, dim: int) -> Find:
    """Magnitude masks by sorting, which groups of 32 need: there are too many ways to try."""

    def find(w: np.ndarray) -> Mask:
        moved = np.moveaxis(w, dim, -1)
        groups = np.abs(moved.reshape(-1, m))
        mask = np.zeros(groups.shape, dtype=bool)
        np.put_along_axis(mask, np.argsort(-groups, axis=1, kind="stable")[:, :n], True, axis=1)
        return np.moveaxis(mask.reshape(moved.shape), -1, dim)

    return find


def blocks(w: np.ndarray) -> Mask:
    """Transposable masks by definition."""
    mask = np.zeros(w.shape, dtype=bool)
    for i in range(0, w.shape[0], 4):
        for j in range(0, w.shape[1], 4):
            mask[i : i + 4, j : j + 4] = oracle.transposable_mask(w[i : i + 4, j : j + 4])
    return mask


def values(optimizer: fused_optim.FusedOptimizer, param: Tensor) -> np.ndarray:
    """All weights of a parameter, as the rule sees them."""
    dense = "dense" if "dense" in optimizer.state.get(param, {}) else "param"
    return fused_optim.full_precision(optimizer, param, dense).numpy()


def stored(optimizer: fused_optim.FusedOptimizer, param: Tensor) -> Mask:
    """The mask in an optimizer's state, taken apart bit by bit."""
    order = memory_order(param)
    bits = np.unpackbits(optimizer.state[param]["mask"].numpy(), count=param.numel(), bitorder="little")
    return bits.astype(bool).reshape([param.shape[i] for i in order]).transpose(np.argsort(order))


def step(optimizer: fused_optim.FusedOptimizer, seed: int) -> None:
    """One step with gradients that depend on the seed."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    for index, param in enumerate(params):
        # Like the parameter: those of another memory order are a layout of their own.
        param.grad = torch.empty_like(param).copy_(normal(param.shape, param.dtype, seed + 100 * index))
    optimizer.step()


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(shape, dtype, sum(shape)).requires_grad_()


class Model(nn.Module):
    """Two layers with masks, and four parameters without."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)


@pytest.mark.parametrize(
    ("recipe", "find", "every"),
    [
        (SRSTE(decay=0.1), groups_of(2, 4, 1), 1),
        (SRSTE(n=1, m=8), groups_of(1, 8, 1), 1),
        (MaskedDecay(total_steps=100, every=1), blocks, 1),
        (MaskedDecay(total_steps=100, every=3, transposable=False), groups_of(2, 4, 1), 3),
    ],
    ids=["sr-ste", "1:8", "transposable", "seldom"],
)
@pytest.mark.parametrize("storage", [{}, {"state_codec": "int8", "param_codec": "bf16_split8"}])
def test_flips_of_masked_training(recipe: Any, find: Find, every: int, storage: dict[str, Any]) -> None:
    model = Model().to(torch.bfloat16 if storage else torch.float32)
    optimizer = AdamW(model.named_parameters(), lr=0.2, sparsity=recipe, **storage)
    masked = {"up.weight": model.up.weight, "down.weight": model.down.weight}
    flips = FlipRate(optimizer)
    before = {name: find(values(optimizer, p)) for name, p in masked.items()}
    for t in range(1, 7):
        step(optimizer, t)
        rate = flips.measure()
        now = {name: stored(optimizer, p) for name, p in masked.items()}
        changed = {name: int((now[name] != before[name]).sum()) for name in masked}
        assert rate.dtype == torch.float64 and rate.ndim == 0
        assert rate.item() == sum(changed.values()) / 256
        by_name = {name: layer.item() for name, layer in flips.by_name().items()}
        assert by_name == {name: count / 128 for name, count in changed.items()}
        assert (rate > 0) == (t % every == 0)
        if not storage and t % every == 0:
            # What is stored in fewer bits was masked before it was rounded.
            assert all(np.array_equal(find(values(optimizer, p)), now[name]) for name, p in masked.items())
        before = now
    assert flips.measure() == 0


LAYOUTS = {
    "matrix": (lambda: weight(8, 24), 1),
    "transposed": (lambda: weight(24, 8).detach().t().requires_grad_(), 1),
    "stack": (lambda: weight(3, 4, 24), 2),
    "convolution": (lambda: weight(4, 24, 3, 2), 1),
    "channels_last": (
        lambda: weight(4, 24, 3, 2).detach().to(memory_format=torch.channels_last).requires_grad_(),
        1,
    ),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (5, 12)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flips_of_any_layout_and_group(layout: str, n: int, m: int, sparse: bool) -> None:
    make, dim = LAYOUTS[layout]
    w, find, recipe = make(), groups_of(n, m, dim), SRSTE(n=n, m=m)
    optimizer = AdamW([w], lr=0.3, sparsity=recipe if sparse else None)
    flips = FlipRate(optimizer, recipe)
    before = find(values(optimizer, w))
    for t in range(3):
        step(optimizer, t)
        now = find(values(optimizer, w))
        assert flips.measure().item() == (now != before).sum() / w.numel() > 0
        assert list(flips.by_name()) == ["parameter 0 of group 0"]
        before = now


@pytest.mark.parametrize(
    ("recipe", "find"),
    [
        (MaskedDecay(total_steps=2), blocks),
        (OneShot(at=100, n=1), groups_of(1, 4, 1)),
        (SRSTE(dense_steps=100, dim=0), groups_of(2, 4, 0)),
        (StructureDecay(total_steps=100, dense_steps=10, kind="geometric"), groups_of(2, 4, 1)),
    ],
    ids=["masked-decay", "one-shot", "sr-ste", "structure-decay"],
)
def test_a_dense_run_has_the_last_masks_of_the_recipe(recipe: Any, find: Find) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    optimizer = AdamW(model.named_parameters(), lr=0.3)
    flips = FlipRate(optimizer, recipe)
    before = find(values(optimizer, model[0].weight))
    for t in range(4):
        step(optimizer, t)
        now = find(values(optimizer, model[0].weight))
        assert flips.measure().item() == (now != before).sum() / 1024 > 0
        before = now
    assert list(flips.by_name()) == ["0.weight"]


def test_weights_have_every_bit_of_their_codec() -> None:
    # Ties in bf16: only the bits below it decide about the mask.
    w = torch.ones(4, 8, dtype=torch.bfloat16).requires_grad_()
    optimizer = SGD([w], lr=2.0**-12, param_codec="bf16_split8")
    flips = FlipRate(optimizer, SRSTE())
    w.grad = torch.tensor([3.0, 2.0, 1.0, 0.0]).bfloat16().repeat(4, 2)
    optimizer.step()
    assert (w == 1).all()
    find = groups_of(2, 4, 1)
    expected = find(values(optimizer, w)) != find(np.ones((4, 8)))
    assert flips.measure().item() == expected.mean() == 1.0


def test_pruning_at_once_is_counted_once() -> None:
    w = weight(8, 16)
    optimizer = AdamW([w], lr=0.1, sparsity=OneShot(at=2))
    flips = FlipRate(optimizer)
    rates = []
    for t in range(5):
        step(optimizer, t)
        rates.append(flips.measure().item())
    # All weights have a place in the mask until half of them lose it; then it stays.
    assert rates == [0.0, 0.5, 0.0, 0.0, 0.0]


def test_sizes_of_groups_may_change() -> None:
    w = weight(8, 32)
    recipe = StructureDecay(total_steps=8, kind="geometric")
    optimizer = AdamW([w], lr=0.3, sparsity=recipe)
    flips = FlipRate(optimizer)
    before = groups_of(16, 32, 1)(values(optimizer, w))
    for t in range(1, 9):
        step(optimizer, t)
        size = recipe.group(t)
        now = groups_of(size // 2, size, 1)(values(optimizer, w))
        assert flips.measure().item() == (now != before).sum() / w.numel() > 0
        before = now


def test_masks_that_come_later_or_never() -> None:
    idle, w = weight(4, 8), weight(8, 8)
    optimizer = AdamW([("idle", idle), ("w", w)], lr=0.5, sparsity=SRSTE())
    flips = FlipRate(optimizer)
    assert not optimizer.state
    apply_masks(optimizer)
    assert flips.measure() == 0, "the masks that were expected"
    before = stored(optimizer, w)
    w.grad = normal(w.shape, w.dtype, 1)
    optimizer.step()
    changed = int((stored(optimizer, w) != before).sum())
    assert flips.measure().item() == changed / 96 > 0
    assert {name: rate.item() for name, rate in flips.by_name().items()} == {"idle": 0, "w": changed / 64}


def test_a_resumed_training_is_compared_with_its_checkpoint() -> None:
    w = weight(8, 16)
    optimizer = AdamW([w], lr=0.3, sparsity=SRSTE())
    flips = FlipRate(optimizer)
    step(optimizer, 1)
    saved, at_save = optimizer.state_dict(), stored(optimizer, w).copy()
    saved = {**saved, "state": {0: {key: value.clone() for key, value in saved["state"][0].items()}}}
    step(optimizer, 2)
    flips.measure()
    now = stored(optimizer, w).copy()
    optimizer.load_state_dict(saved)
    assert flips.measure().item() == (now != at_save).sum() / w.numel() > 0


def test_last_masks_survive_a_resume() -> None:
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    optimizers = [AdamW(m.named_parameters(), lr=0.3, sparsity=SRSTE()) for m in (model, twin)]
    flips = FlipRate(optimizers[0])
    for optimizer in optimizers:
        step(optimizer, 1)
    resumed = FlipRate(optimizers[1])
    resumed.load_state_dict(flips.state_dict())
    assert resumed.measure() == flips.measure() > 0
    step(optimizers[1], 2)
    assert resumed.measure() > 0 == flips.measure(), "masks of its own"
    saved = flips.state_dict()
    for damaged, error, message in (
        ({"up.weight": saved["up.weight"]}, ValueError, r"masks of \['up.weight'\] are not those of"),
        ({**saved, "up.weight": saved["up.weight"][:-1]}, ValueError, "not of the same weights"),
        ({**saved, "up.weight": saved["up.weight"].float()}, TypeError, "uint8"),
    ):
        with pytest.raises(error, match=message):
            flips.load_state_dict(damaged)
    assert flips.measure() == 0


def test_hidden_weights_are_known_before_the_first_step() -> None:
    # Ties in bf16, which is what the model sees.
    w = torch.ones(4, 8, dtype=torch.bfloat16).requires_grad_()
    optimizer = AdamW([w], sparsity=SRSTE(), param_codec="bf16_split16")
    fused_optim.set_full_precision(optimizer, w, 1 + torch.arange(32).view(4, 8) / 2**14)
    flips = FlipRate(optimizer)
    apply_masks(optimizer)
    assert flips.measure() == 0 and stored(optimizer, w)[0].tolist() == [False, False, True, True] * 2


def test_nothing_that_is_measured_changes() -> None:
    w = weight(8, 16, dtype=torch.bfloat16)
    for sparsity, recipe in ((SRSTE(), None), (None, SRSTE())):
        optimizer = AdamW([w], lr=0.3, sparsity=sparsity, param_codec="bf16_split16")
        step(optimizer, 1)
        flips = FlipRate(optimizer, recipe)
        before = {key: value.clone() for key, value in (*optimizer.state[w].items(), ("w", w.detach()))}
        flips.measure()
        after = {**optimizer.state[w], "w": w.detach()}
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_layers_of_one_name_are_told_apart() -> None:
    one, two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    optimizer = AdamW([{"params": layer.named_parameters()} for layer in (one, two)], sparsity=SRSTE())
    flips = FlipRate(optimizer)
    step(optimizer, 1)
    flips.measure()
    assert list(flips.by_name()) == [
        "parameter 0 of group 0 ('weight')",
        "parameter 0 of group 1 ('weight')",
    ]


def test_a_report_has_the_flips_of_each_layer() -> None:
    model = Model()
    optimizer = AdamW(model.named_parameters(), lr=0.3, sparsity=SRSTE())
    flips = FlipRate(optimizer)
    before = groups_of(2, 4, 1)(values(optimizer, model.up.weight))
    step(optimizer, 1)
    flips.measure()
    found = report(model, flips=flips.by_name())
    rows = {row.name: row for row in found.rows}
    changed = (stored(optimizer, model.up.weight) != before).mean()
    assert rows["up.weight"].flips == changed > 0 and rows["up.weight"].density == 0.5
    assert rows["embed.weight"].flips is None
    head, embed, up, *_ = str(found).splitlines()
    assert head.split() == ["weight", "shape", "density", "energy", "kept", "flips", "pattern"]
    assert up.split() == ["up.weight", "16x8", "0.5000", "1.0000", f"{changed:.4f}", "2:4"]
    assert embed.split() == ["embed.weight", "10x8", "1.0000", "left", "out"]
    assert "flips" not in str(report(model))
    with pytest.raises(ValueError, match="flips names 'parameter 1', no matrix of the model"):
        report(model, flips={"parameter 1": 0.5, "up.weight": 0.5})
    with pytest.raises(TypeError, match="flips must map names to flip rates"):
        report(model, flips=flips)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: FlipRate(AdamW([w])), ValueError, "no option sparsity; give the recipe"),
        (
            lambda w: FlipRate(AdamW([("w", w), ("b", w[0].clone())], sparsity=SRSTE(m=5))),
            ValueError,
            r"no parameter can have masks \(w: dimension 1 has 8 weights, no multiple of 5; b: not meant by",
        ),
        (lambda w: FlipRate(AdamW([("w", w)]), SRSTE(apply_to="up*")), ValueError, "w: not meant by"),
        (lambda w: FlipRate(AdamW([w]), SRSTE(apply_to="up*")), ValueError, "without a name"),
        (
            lambda w: FlipRate(AdamW([w]), SRSTE(m=5, strict=True)),
            ValueError,
            "cannot be masked: dimension 1",
        ),
        (lambda w: FlipRate(AdamW([w[:0].detach()]), SRSTE()), ValueError, "it has no weights"),
        (
            lambda w: FlipRate(AdamW([w], sparsity=SRSTE()), SRSTE(n=1)),
            ValueError,
            "different masks of param",
        ),
        (
            lambda w: FlipRate(AdamW([w], sparsity=SRSTE()), MaskedDecay(total_steps=9)),
            ValueError,
            "give the same pattern, dim and apply_to to both, or leave recipe out",
        ),
        (
            lambda w: FlipRate(
                AdamW([{"params": [w]}, {"params": [w.clone().detach()], "sparsity": SRSTE()}]), SRSTE()
            ),
            ValueError,
            "different masks of parameter 0 of group 0",
        ),
        (lambda w: FlipRate(torch.optim.SGD([w]), SRSTE()), TypeError, "one of fused_optim's, got SGD"),  # pyright: ignore[reportArgumentType]
        (lambda w: FlipRate(AdamW([w]), (2, 4)), TypeError, r"such as SRSTE\(\), got \(2, 4\)"),  # pyright: ignore[reportArgumentType]
        (lambda w: FlipRate(AdamW([w]), SRSTE()).by_name(), ValueError, "no flip rates yet; call measure"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(weight(8, 8).detach())


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True])
def test_flips_on_a_gpu_are_the_same_and_masks_need_no_wait(sparse: bool) -> None:
    recipe = MaskedDecay(total_steps=100, every=1)
    here, there = weight(16, 32), weight(16, 32).detach().cuda().requires_grad_()
    optimizers = [AdamW([w], lr=0.3, sparsity=recipe if sparse else None) for w in (here, there)]
    flips = [FlipRate(optimizer, recipe) for optimizer in optimizers]
    for t in range(3):
        for optimizer in optimizers:
            step(optimizer, t)
        torch.cuda.set_sync_debug_mode("error" if sparse else "default")
        try:
            rate = flips[1].measure()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert rate.is_cuda and rate.item() == flips[0].measure().item() > 0
