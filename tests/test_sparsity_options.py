"""The option ``sparsity``: what it applies to, what it refuses, and how it meets other options."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_optim
from fused_optim import AdamW
from fused_optim.sparsity import (
    CAST,
    SRSTE,
    FlipRate,
    MaskDecay,
    MaskedDecay,
    OneShot,
    StructureDecay,
    apply_masks,
    listing,
    masks_of,
)
from tests.cases import assert_same_bits, normal


def step(optimizer: fused_optim.FusedOptimizer, seed: int) -> None:
    """One step with gradients that depend on the seed."""
    for group in optimizer.param_groups:
        for index, param in enumerate(group["params"]):
            param.grad = normal(param.shape, param.dtype, seed + 100 * index)
    optimizer.step()


def weight(rows: int = 8, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal((rows, width), dtype, seed).requires_grad_()


def half_zero(w: Tensor) -> bool:
    return bool(((w != 0).view(-1, 4).sum(1) == 2).all())


class Model(nn.Module):
    """Of everything something."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.up = nn.Linear(8, 16)
        self.odd = nn.Linear(16, 6)
        self.narrow = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(3, 8, 3)
        self.lm_head = nn.Linear(8, 10)


def test_listing_says_why_layers_are_dense() -> None:
    optimizer = AdamW(Model().named_parameters(), sparsity=SRSTE())
    places = {place.name: place for place in listing(optimizer)}
    assert {name for name, place in places.items() if place.pattern == "2:4"} == {"up.weight", "odd.weight"}
    assert places["narrow.weight"].reason == "dimension 1 has 6 weights, no multiple of 4"
    assert places["conv.weight"].reason == "dimension 1 has 3 weights, no multiple of 4"
    for name in ("embed.weight", "lm_head.weight", "up.bias", "norm.weight"):
        assert places[name].reason == "not meant by apply_to"
    step(optimizer, 1)
    assert set(masks_of(optimizer)) == {"up.weight", "odd.weight"} == set(FlipRate(optimizer).state_dict())


def test_patterns_and_groups_choose_layers() -> None:
    model = Model()
    groups = [
        {"params": list(model.up.named_parameters("up")), "sparsity": OneShot(n=1, m=4)},
        {"params": list(model.odd.named_parameters("odd"))},
    ]
    optimizer = AdamW(groups, sparsity=SRSTE(apply_to="*.bias"))
    step(optimizer, 1)
    assert float((model.up.weight == 0).float().mean()) == 0.75
    assert (model.odd.weight != 0).all() and list(masks_of(optimizer)) == ["up.weight"]


def test_a_model_sees_masked_weights_before_its_first_step_if_asked() -> None:
    w = weight()
    before = w.detach().clone()
    optimizer = AdamW([w], sparsity=SRSTE())
    assert_same_bits(w, before)
    apply_masks(optimizer)
    assert half_zero(w.detach())
    assert_same_bits(optimizer.state[w]["dense"], before)
    assert float(optimizer.state[w]["step"]) == 0


@pytest.mark.parametrize(
    "param_codec", ["auto", "bf16", "bf16_sr", "bf16_kahan", "bf16_split8", "bf16_split16"]
)
@pytest.mark.parametrize("recipe", [OneShot(), SRSTE()], ids=["in_place", "dense"])
def test_pruned_weights_are_zero_in_every_plane(recipe: Any, param_codec: str) -> None:
    w = weight(dtype=torch.bfloat16)
    optimizer = AdamW([w], lr=0.01, sparsity=recipe, param_codec=param_codec)
    for seed in range(3):
        step(optimizer, seed)
    pruned = ~next(iter(masks_of(optimizer).values()))
    planes = {key: value for key, value in optimizer.state[w].items() if key.startswith("param")}
    assert half_zero(w.detach()) and all((plane[pruned] == 0).all() for plane in (w, *planes.values()))
    dense = {key: value.dtype for key, value in optimizer.state[w].items() if key.startswith("dense")}
    if isinstance(recipe, OneShot):
        assert not dense and bool(planes) == (param_codec not in ("auto", "bf16", "bf16_sr"))
    else:
        assert not planes and dense["dense"] == (torch.float32 if param_codec == "auto" else torch.bfloat16)


def test_a_dense_checkpoint_continues_sparse() -> None:
    w = weight()
    dense = AdamW([w], lr=0.01)
    step(dense, 1)
    for recipe in (SRSTE(), OneShot()):
        again = w.detach().clone().requires_grad_()
        sparse = AdamW([again], lr=0.01, sparsity=recipe)
        sparse.load_state_dict(dense.state_dict())
        before = again.detach().clone()
        apply_masks(sparse)
        assert half_zero(again.detach()) and float(sparse.state[again]["step"]) == 1
        if isinstance(recipe, SRSTE):
            assert_same_bits(sparse.state[again]["dense"], before)
        step(sparse, 2)
        assert half_zero(again.detach())


def test_masks_without_a_name_of_their_own_are_all_listed() -> None:
    groups = [{"params": [("weight", weight())]}, {"params": [("weight", weight())]}]
    for given in (groups, [{"params": [weight()]}, {"params": [weight()]}]):
        optimizer = AdamW(given, sparsity=OneShot())
        step(optimizer, 1)
        assert list(masks_of(optimizer)) == [optimizer._name(0, 0), optimizer._name(1, 0)]


@pytest.mark.parametrize("param_codec", ["auto", "bf16_split16"])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_recipe_that_keeps_dense_weights_takes_those_of_one_that_does_not(
    loaded: bool, param_codec: str
) -> None:
    dtype = torch.float32 if param_codec == "auto" else torch.bfloat16
    w = weight(dtype=dtype)
    optimizer = AdamW([w], lr=0.01, sparsity=OneShot(), param_codec=param_codec)
    step(optimizer, 1)
    before = fused_optim.full_precision(optimizer, w)
    mask = masks_of(optimizer)
    if loaded:
        saved, optimizer = (
            optimizer.state_dict(),
            AdamW([w], lr=0.01, sparsity=SRSTE(), param_codec=param_codec),
        )
        # A codec that hides bits keeps them elsewhere then, and says so.
        if param_codec != "auto":
            with pytest.raises(ValueError, match="param"):
                optimizer.load_state_dict(saved)
            return
        optimizer.load_state_dict(saved)
    else:
        optimizer.param_groups[0]["sparsity"] = SRSTE()
    assert masks_of(optimizer).keys() == mask.keys()
    apply_masks(optimizer)
    assert_same_bits(fused_optim.full_precision(optimizer, w, "dense"), before)
    assert all(torch.equal(found, mask[name]) for name, found in masks_of(optimizer).items())
    step(optimizer, 2)
    assert half_zero(w.detach()) and not any(key.startswith("param") for key in optimizer.state[w])
    twin = AdamW([w.detach().clone().requires_grad_()], sparsity=SRSTE(), param_codec=param_codec)
    twin.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("how", ["loaded", "changed"])
@pytest.mark.parametrize(
    "later", [OneShot(n=1, m=4), OneShot(n=2, m=8), OneShot(dim=0), OneShot(n=3, m=4), SRSTE(n=1, m=4)]
)
def test_masks_of_another_pattern_are_found_anew(later: Any, how: str) -> None:
    w = weight()
    optimizer = AdamW([w], lr=0.01, sparsity=OneShot())
    step(optimizer, 1)
    if how == "loaded":
        saved, optimizer = optimizer.state_dict(), AdamW([w], lr=0.01, sparsity=later)
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["sparsity"] = later
    step(optimizer, 2)
    dim = -1 if later.dim is None else later.dim
    (mask,) = masks_of(optimizer).values()
    groups = mask.movedim(dim, -1).reshape(-1, later.m)
    assert (groups.sum(1) == later.n).all()
    assert (w.detach()[~mask] == 0).all() and (w.detach()[mask] != 0).all()


def test_fitting_masks_stay_as_they_are() -> None:
    w = weight()
    optimizer = AdamW([w], lr=0.5, sparsity=OneShot())
    step(optimizer, 1)
    (mask,) = masks_of(optimizer).values()
    with torch.no_grad():
        w.copy_(weight(seed=5))
    again = AdamW([w], lr=0.5, sparsity=OneShot(at=1))
    again.load_state_dict(optimizer.state_dict())
    step(again, 2)
    assert torch.equal(next(iter(masks_of(again).values())), mask)


def test_a_state_from_before_pruning_is_pruned_by_an_earlier_one() -> None:
    w = weight()
    late = AdamW([w], lr=0.01, sparsity=OneShot(at=9))
    for seed in range(3):
        step(late, seed)
    early = AdamW([w], lr=0.01, sparsity=OneShot(at=2))
    early.load_state_dict(late.state_dict())
    step(early, 4)
    assert half_zero(w.detach())


def test_a_portable_state_has_masks_beside_it_and_loads_into_torch() -> None:
    w = weight()
    optimizer = AdamW([w], lr=0.01, sparsity=SRSTE())
    step(optimizer, 1)
    portable = optimizer.state_dict(portable=True)
    assert set(portable["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(portable["fused_optim_masks"][0]) == {"step", "mask", "dense"}
    torch.optim.AdamW([w]).load_state_dict(portable)


@pytest.mark.parametrize("other", ["dense", "width", "codec"])
def test_masks_of_another_model_are_refused(other: str) -> None:
    w = weight(dtype=torch.bfloat16)
    optimizer = AdamW([w], sparsity=SRSTE(), param_codec="bf16_split16")
    step(optimizer, 1)
    saved = optimizer.state_dict()
    if other == "dense":
        target = AdamW([weight(dtype=torch.bfloat16)])
        message = "belongs to another optimizer or to other options"
    elif other == "width":
        saved["state"][0]["mask"] = saved["state"][0]["mask"][:-1]
        target, message = (
            AdamW([weight(dtype=torch.bfloat16)], sparsity=SRSTE(), param_codec="bf16_split16"),
            "mask",
        )
    else:
        target = AdamW([weight(dtype=torch.bfloat16)], sparsity=SRSTE(), param_codec="bf16_split8")
        message = "with weights as 'bf16_split16'.*with weights as 'bf16_split8'.*param_codec"
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(saved)
    assert not target.state


def test_copies_and_pickles_go_on_alike() -> None:
    w = weight()
    optimizer = AdamW([w], lr=0.01, sparsity=SRSTE())
    step(optimizer, 1)
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    step(optimizer, 2)
    for twin in twins:
        step(twin, 2)
        assert_same_bits(twin.param_groups[0]["params"][0], w)


def test_a_skipped_step_leaves_masks_alone() -> None:
    for recipe in (SRSTE(), MaskedDecay(total_steps=10, every=1)):
        w = weight()
        optimizer = AdamW([w], lr=0.1, sparsity=recipe, skip_nonfinite=True)
        step(optimizer, 1)
        before = {key: value.clone() for key, value in (*optimizer.state[w].items(), ("w", w.detach()))}
        w.grad = torch.full_like(w, float("nan"))
        optimizer.step()
        assert optimizer.skipped_steps == 1
        for key, value in (*optimizer.state[w].items(), ("w", w.detach())):
            assert_same_bits(value, before[key], key)
        step(optimizer, 2)
        assert not torch.equal(w, before["w"])


def test_options_may_change_between_steps() -> None:
    w = weight()
    optimizer = AdamW([w], lr=0.01, sparsity=OneShot(at=2))
    for seed in range(4):
        step(optimizer, seed)
        assert half_zero(w.detach()) == (seed >= 1)
    # The mask is kept; what is pruned may return.
    optimizer.param_groups[0]["sparsity"] = None
    step(optimizer, 5)
    assert (w != 0).all()


def test_recipes_that_share_a_launch() -> None:
    """One whose groups change size does so also where the first parameter's recipe never changes."""
    changing = StructureDecay(total_steps=8, kind="geometric")
    alone, first, second = weight(64, 64, 1), weight(64, 64, 2), weight(64, 64, 1)
    optimizers = (
        AdamW([alone], lr=0.01, sparsity=changing),
        AdamW(
            [{"params": [first], "sparsity": SRSTE(n=4, m=8)}, {"params": [second], "sparsity": changing}],
            lr=0.01,
        ),
    )
    for t in range(10):
        for param in (alone, first, second):
            param.grad = normal((64, 64), torch.float32, seed=t)
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(second, alone)
    assert half_zero(second)


@pytest.mark.parametrize("strict", [True, False])
def test_patterns_need_names(strict: bool) -> None:
    recipe = SRSTE(apply_to=["layers.*"], strict=strict)
    with pytest.raises(ValueError, match=r"apply_to has the name patterns.*without a name"):
        AdamW([weight()], sparsity=recipe)
    AdamW([("layers.0.weight", weight())], sparsity=recipe)


def test_a_nan_weight_is_kept() -> None:
    w = weight()
    w.data[0, 1] = float("nan")
    optimizer = AdamW([w], sparsity=OneShot())
    step(optimizer, 1)
    assert w[0, 1].isnan() and int((w[0, :4] != 0).sum()) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneShot(n=4, m=4), "n=4, m=4"),
        (lambda: OneShot(n=0, m=4), "0 < n < m"),
        (lambda: SRSTE(n=2, m=64), "m <= 32"),
        (lambda: SRSTE(decay=-1.0), "decay=-1.0"),
        (lambda: OneShot(at=-1), "at=-1"),
        (lambda: OneShot(n=1, m=4, transposable=True), "2:4"),
        (MaskDecay, "needs decay_steps"),
        (lambda: MaskDecay(decay_steps=0), "decay_steps=0"),
        (lambda: MaskDecay(decay_steps=5, kind="cubic"), "kind='cubic'"),  # pyright: ignore[reportArgumentType]
        (lambda: MaskDecay(decay_steps=5, coefficient=0.1), "exponential"),
        (StructureDecay, "needs total_steps"),
        (lambda: StructureDecay(total_steps=1), "less than a step"),
        (MaskedDecay, "needs total_steps"),
        (lambda: MaskedDecay(total_steps=9, dense_end=1.0), "dense_end=1.0"),
        (lambda: SRSTE(every=0), "every=0 must be at least 1"),
        (lambda: SRSTE(dense_steps=-1), "dense_steps=-1 must be at least 0"),
        (CAST, "needs total_steps"),
        (lambda: AdamW([weight()], sparsity=CAST(total_steps=9)), "CASTAdamS"),
        (lambda: fused_optim.CASTAdamS([weight()]), r"needs CAST\(total_steps=...\)"),
        (lambda: AdamW([weight(width=18)], sparsity=SRSTE(strict=True)), "18 weights, no multiple of 4"),
        (lambda: AdamW([weight()], sparsity=SRSTE(dim=3, strict=True)), "no dimension 3"),
        (lambda: AdamW([weight(dtype=torch.float64)], sparsity=SRSTE(strict=True)), "float64"),
        (lambda: AdamW([weight(rows=6)], sparsity=OneShot(transposable=True, strict=True)), "6 weights"),
    ],
)
def test_bad_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: OneShot(n=2.0, m=4),
        lambda: SRSTE(decay="strong"),
        lambda: SRSTE(dim=1.0),
        lambda: SRSTE(apply_to=3),
        lambda: MaskDecay(decay_steps=10.0),
        lambda: AdamW([weight()], sparsity="2:4"),
    ],
)
def test_bad_types(make: Any) -> None:
    with pytest.raises(TypeError):
        make()


@pytest.mark.parametrize("recipe", [OneShot(), SRSTE()], ids=["in_place", "dense"])
@pytest.mark.parametrize("steps", [0, 1])
def test_weights_are_set_with_every_bit_and_stay_masked(recipe: Any, steps: int) -> None:
    w = weight(dtype=torch.bfloat16)
    optimizer = AdamW([w], lr=0.01, sparsity=recipe, param_codec="bf16_split16")
    for seed in range(steps):
        step(optimizer, seed)
    values = weight(seed=5).detach()
    fused_optim.set_full_precision(optimizer, w, values)
    apply_masks(optimizer)
    assert half_zero(w.detach())
    kept = w.detach() != 0
    name = "dense" if recipe.keeps_dense else "param"
    found = fused_optim.full_precision(optimizer, w, name)
    assert_same_bits(found[kept], values[kept])
    if recipe.keeps_dense:
        assert_same_bits(found, values)
