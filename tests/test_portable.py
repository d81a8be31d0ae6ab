"""Portable state dicts: masks and the weights behind them; hooks that see what is returned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_optim import SGD, AdamW, FusedOptimizer, Muon, full_precision, set_full_precision
from fused_optim.sparsity import SRSTE, OneShot, StructureDecay
from tests.cases import assert_same_bits, normal
from tests.checkpointing import written_and_read


def _train(optimizer: Any, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = normal(tuple(param.shape), param.dtype, step)
        optimizer.step()


def _trained(make: Callable[..., Any], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    weight = Parameter(normal((64, 64), dtype, 0))
    optimizer = make([weight], **options)
    _train(optimizer, range(3))
    return weight, optimizer


def _portable(optimizer: FusedOptimizer) -> dict[str, Any]:
    return written_and_read(optimizer.state_dict(portable=True))


CASES: dict[str, tuple[Callable[..., FusedOptimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1, "sparsity": SRSTE()}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "sparsity": SRSTE(every=3)}),
    "decay": (
        SGD,
        {"lr": 0.1, "momentum": 0.9, "sparsity": StructureDecay(n=1, m=8, total_steps=9, kind="geometric")},
    ),
    "adamw": (AdamW, {"lr": 0.1, "sparsity": SRSTE()}),
    "one_shot": (AdamW, {"lr": 0.1, "sparsity": OneShot(at=2)}),
    "one_shot_sgd": (SGD, {"lr": 0.1, "sparsity": OneShot(at=2)}),
    "other_dimension": (AdamW, {"lr": 0.1, "sparsity": SRSTE(dim=0)}),
}


@pytest.mark.parametrize(("make", "options"), CASES.values(), ids=CASES)
def test_training_goes_on_with_the_dense_weights(
    make: Callable[..., FusedOptimizer], options: dict[str, Any]
) -> None:
    """Half of what was learnt was zero after loading: the dense weights came from the masked ones."""
    weight, optimizer = _trained(make, **options)
    other = Parameter(weight.detach().clone())
    resumed = make([other], **options)
    resumed.load_state_dict(_portable(optimizer))
    for name, value in optimizer.state[weight].items():
        assert_same_bits(resumed.state[other][name], value, name)
    _train(optimizer, range(3, 9))
    _train(resumed, range(3, 9))
    assert_same_bits(other, weight)


@pytest.mark.parametrize("now", ["bf16_split16", "bf16_split8", "bf16_kahan", "bf16", "auto"])
@pytest.mark.parametrize("before", ["bf16_split8", "auto"])
def test_dense_weights_move_between_codecs(before: str, now: str) -> None:
    weight, optimizer = _trained(AdamW, torch.bfloat16, param_codec=before, sparsity=SRSTE())
    other = Parameter(weight.detach().clone())
    options: dict[str, Any] = {"param_codec": now, "state_codec": "int8", "keep_fp32": 0}
    resumed = AdamW([other], **options, sparsity=SRSTE())
    resumed.load_state_dict(_portable(optimizer))
    dense = full_precision(optimizer, weight, "dense")
    assert (dense != 0).all()
    tolerance = {"bf16": 2.0**-8, "bf16_split8": 2.0**-16, "bf16_kahan": 2.0**-16}.get(now, 0.0)
    torch.testing.assert_close(full_precision(resumed, other, "dense"), dense, rtol=tolerance, atol=0)
    assert_same_bits(resumed.state[other]["mask"], optimizer.state[weight]["mask"])
    _train(resumed, range(3, 5))


@pytest.mark.parametrize("sparsity", [None, OneShot(at=0)], ids=["none", "one_shot"])
def test_other_recipes_go_on_with_what_the_model_sees(sparsity: Any) -> None:
    weight, optimizer = _trained(AdamW, sparsity=SRSTE())
    other = Parameter(weight.detach().clone())
    resumed = AdamW([other], sparsity=sparsity)
    resumed.load_state_dict(_portable(optimizer))
    assert "dense" not in resumed.state[other] and ("mask" in resumed.state[other]) == bool(sparsity)
    _train(resumed, range(3, 5))
    assert bool((other == 0).any()) == bool(sparsity)


WAYS: list[dict[str, Any]] = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_torch_loads_and_steps_and_brings_no_old_weights_back(name: str, way: dict[str, Any]) -> None:
    make, options = CASES[name]
    weight, optimizer = _trained(make, **options)
    saved, other = _portable(optimizer), Parameter(weight.detach().clone())
    saved["param_groups"][0] |= {"foreach": None, "fused": None, **way}
    theirs_class: Any = torch.optim.SGD if make is SGD else torch.optim.AdamW
    theirs = theirs_class([other], lr=0.1, **way)
    theirs.load_state_dict(saved)
    _train(theirs, range(3, 6))
    learnt = other.detach().clone()
    back = make([other], **options)
    back.load_state_dict(theirs.state_dict())
    back.param_groups[0]["lr"] = back.param_groups[0]["weight_decay"] = 0.0
    other.grad = torch.zeros_like(other)
    back.step()
    assert (full_precision(back, other, "dense") - learnt).abs().max() < 1e-4


def test_masks_from_before_the_first_step() -> None:
    """A step that changed nothing has made masks; all weights may have been written since."""
    weights = [Parameter(normal((8, 8), torch.float32, seed)) for seed in range(2)]
    first, second = (SGD([w], lr=0.1, momentum=0.9, sparsity=SRSTE(), skip_nonfinite=True) for w in weights)
    weights[0].grad = torch.full((8, 8), float("nan"))
    first.step()
    values = normal((8, 8), torch.float32, 7)
    set_full_precision(first, weights[0], values)
    weights[1].data.copy_(weights[0])
    second.load_state_dict(_portable(first))
    assert_same_bits(full_precision(second, weights[1], "dense"), values)
    for optimizer in (first, second):
        _train(optimizer, range(3))
    assert_same_bits(weights[1], weights[0])


@pytest.mark.parametrize("others", ["adamw", "lion"])
def test_muon_keeps_the_count_of_its_second_moments(others: str) -> None:
    """What a portable state dict left out, loading asked for."""
    pairs = [[Parameter(normal(shape, torch.float32, 1)) for shape in ((8, 8), (8,))] for _ in range(2)]
    first, second = (Muon([("w", pair[0]), ("b", pair[1])], others=others) for pair in pairs)
    _train(first, range(3))
    for param, other in zip(*pairs, strict=True):
        other.data.copy_(param.data)
    second.load_state_dict(_portable(first))
    for optimizer in (first, second):
        _train(optimizer, range(3, 6))
    for param, other in zip(*pairs, strict=True):
        assert_same_bits(other, param)


def _no_tensor(masks: dict[Any, Any]) -> None:
    masks[0]["dense"] = None


def _no_step(masks: dict[Any, Any]) -> None:
    del masks[0]["step"]


def _renamed(masks: dict[Any, Any]) -> None:
    masks["w"] = masks.pop(0)


def _too_small(masks: dict[Any, Any]) -> None:
    masks[0]["dense"] = masks[0]["dense"][1:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_no_tensor, "damaged"), (_no_step, "step count"), (_renamed, "'w'"), (_too_small, "'dense'.*shape")],
)
def test_damaged_masks_are_refused(damage: Callable[[dict[Any, Any]], None], message: str) -> None:
    _, optimizer = _trained(AdamW, sparsity=SRSTE())
    saved = copy.deepcopy(_portable(optimizer))
    damage(saved["fused_optim_masks"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="damaged"):
        optimizer.load_state_dict({**saved, "fused_optim_masks": [1]})


@pytest.mark.parametrize("portable", [False, True])
def test_hooks_see_and_change_what_is_returned(portable: bool) -> None:
    """They saw what was packed afterwards, and entries that they added were lost."""
    _, optimizer = _trained(AdamW, state_codec="bf16", sparsity=SRSTE())
    plain, seen = optimizer.state_dict(portable=portable), list[Any]()

    def tagged(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        seen.append(("post", set(saved), set(saved["state"][0])))
        return {**saved, "state": {key: {**entry, "tag": 7} for key, entry in saved["state"].items()}}

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    optimizer.register_state_dict_post_hook(tagged)
    optimizer.register_state_dict_post_hook(lambda _, saved: saved["state"][0].update(last=True))
    saved = optimizer.state_dict(portable=portable)
    assert seen == ["pre", ("post", set(plain), set(plain["state"][0]))]
    assert saved["state"][0].pop("tag") == 7 and saved["state"][0].pop("last")
    assert set(saved["state"][0]) == set(plain["state"][0])
    for name, value in plain["state"][0].items():
        assert isinstance(value, Tensor)
        assert_same_bits(saved["state"][0][name], value, name)
