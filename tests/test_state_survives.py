"""States under changed layouts and options, and what a state dict must not hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter

import fused_optim
from fused_optim import AdamW, AdamW4bit, AdamW8bit, FusedOptimizer, Lion, Muon, full_precision
from fused_optim.sparsity import SRSTE, OneShot
from fused_optim.spectral import Hypersphere

CHANNELS = 16
BY_CODES: dict[str, Callable[..., FusedOptimizer]] = {
    "int4": partial(AdamW4bit, keep_fp32=0),
    "int8": partial(AdamW8bit, keep_fp32=0),
    "fp8": partial(AdamW, state_codec="fp8", keep_fp32=0),
    "mask": partial(fused_optim.SGD, lr=0.1, sparsity=OneShot(at=0)),
    "mask_and_dense": partial(AdamW, state_codec="int4", keep_fp32=0, sparsity=SRSTE()),
}
MADE_OF_VECTORS = pytest.mark.parametrize("make", BY_CODES.values(), ids=BY_CODES)


def _conv(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, CHANNELS, 3, bias=False).to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]


def _train(model: nn.Module, optimizer: FusedOptimizer, steps: int = 2, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).contiguous()
        optimizer.step()


def _values(optimizer: FusedOptimizer, param: nn.Parameter) -> dict[str, torch.Tensor]:
    portable = optimizer.state_dict(portable=True)["state"][0]
    named = {name: value for name, value in portable.items() if name != "step" and value is not None}
    return {name: torch.as_tensor(value).clone() for name, value in named.items()} | {
        "param": full_precision(optimizer, param).clone()
    }


def _assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm().clamp_min(1e-30)
        assert error < 0.15, f"{name}: {error}"


@MADE_OF_VECTORS
def test_another_memory_format_is_noticed(make: Callable[..., FusedOptimizer]) -> None:
    """What lies in vectors cannot show in which order the parameter lay."""
    model = _conv()
    optimizer = make(model.named_parameters())
    _train(model, optimizer)
    before = _values(optimizer, model.weight)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    _assert_close(_values(optimizer, model.weight), before)
    shown = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"0.*load_state_dict\(optimizer\.state_dict\(\)\)"):
        _train(model, optimizer, 1)
    assert torch.equal(model.weight, shown)
    optimizer.load_state_dict(optimizer.state_dict())
    _assert_close(_values(optimizer, model.weight), before)
    _train(model, optimizer, 1)


def test_a_transposed_matrix_is_noticed() -> None:
    weight = Parameter(torch.randn(32, 64))
    optimizer = AdamW4bit([weight], keep_fp32=0)
    weight.grad = torch.randn(32, 64)
    optimizer.step()
    weight.data = weight.data.t().contiguous().t()
    weight.grad = torch.randn(32, 64)
    with pytest.raises(ValueError, match="outermost first"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@MADE_OF_VECTORS
@pytest.mark.parametrize("there", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("here", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("way", ["own", "renamed", "helpers", "file"])
def test_checkpoints_move_between_memory_formats(
    make: Callable[..., FusedOptimizer], here: Any, there: Any, way: str, tmp_path: Path
) -> None:
    source, target = _conv(here), _conv(there)
    saved, loaded = make(source.named_parameters()), make(target.named_parameters())
    _train(source, saved)
    target.load_state_dict(source.state_dict())
    if way == "own":
        loaded.load_state_dict(saved.state_dict())
    elif way == "renamed":
        plain = saved.state_dict()
        plain["state"] = {"w": plain["state"][0]}
        plain["param_groups"][0]["params"] = ["w"]
        loaded.load_state_dict(plain)
    elif way == "helpers":
        set_optimizer_state_dict(target, loaded, get_optimizer_state_dict(source, saved))
    else:
        _train(target, loaded)
        target.load_state_dict(source.state_dict())
        dcp.save(get_optimizer_state_dict(source, saved), checkpoint_id=tmp_path, no_dist=True)
        template = get_optimizer_state_dict(target, loaded)
        dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(target, loaded, template)
    _assert_close(_values(loaded, target.weight), _values(saved, source.weight))
    _train(target, loaded, 1)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one_shot": ({"sparsity": OneShot(at=0)}, {"sparsity": None}),
    "sr_ste": ({"sparsity": SRSTE()}, {"sparsity": None}),
    "sr_ste_to_one_shot": ({"sparsity": SRSTE()}, {"sparsity": OneShot(at=0)}),
    "hypersphere": ({"spectral": Hypersphere()}, {"spectral": None}),
    "amsgrad": ({"amsgrad": True}, {"amsgrad": False}),
    "split8": ({"param_codec": "bf16_split8"}, {"param_codec": "auto"}),
    "kahan": ({"param_codec": "bf16_kahan"}, {"param_codec": "bf16_split16"}),
}


@pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("steps", [0, 1])
def test_options_may_change_and_checkpoints_follow(
    before: dict[str, Any], after: dict[str, Any], steps: int
) -> None:
    dtype = torch.bfloat16 if "param_codec" in before else torch.float32
    model = nn.Linear(32, 32, bias=False).to(dtype)
    optimizer = AdamW(model.named_parameters(), **before)
    for group in optimizer.param_groups:
        for _ in range(2):
            model.weight.grad = torch.randn_like(model.weight)
            optimizer.step()
        group.update(after)
    for _ in range(steps):
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    fresh = AdamW(model.named_parameters(), **after)
    fresh.load_state_dict(saved)
    assert set(fresh.state[model.weight]) == set(optimizer.state[model.weight])


def test_dense_weights_of_an_earlier_recipe_do_not_come_back() -> None:
    weight = Parameter(torch.ones(8, 8))
    optimizer = fused_optim.SGD([("w", weight)], lr=1.0, sparsity=SRSTE(decay=0.0))
    for recipe in (SRSTE(decay=0.0), None, None, SRSTE(decay=0.0)):
        optimizer.param_groups[0]["sparsity"] = recipe
        weight.grad = torch.ones(8, 8)
        optimizer.step()
    # From 1 to 0 and, with every weight in the model, to -1, -2 and -3.
    assert torch.equal(optimizer.state[weight]["dense"], torch.full((8, 8), -3.0))


def _state_dict(cls: Any = AdamW, **options: Any) -> tuple[FusedOptimizer, dict[str, Any]]:
    weight = Parameter(torch.randn(64, 64))
    optimizer = cls([("embed.weight", weight)], **options)
    weight.grad = torch.randn(64, 64)
    optimizer.step()
    return optimizer, copy.deepcopy(optimizer.state_dict())


def _drop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["state"][0].pop(key)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    *parents, last = path.split("/")

    def damage(saved: Any) -> None:
        for key in parents:
            saved = saved[int(key) if key.isdigit() else key]
        saved[last] = value(saved[last]) if callable(value) else value

    return damage


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no_step": (_drop("step"), "step count of parameter 0 .*'embed.weight'"),
    "short_names": (_set("param_groups/0/param_names", []), "param_names"),
    "unknown_state_codec": (_set("param_groups/0/state_codec", "zzz"), "zzz"),
    "unknown_param_codec": (_set("param_groups/0/param_codec", "zzz"), "zzz"),
    "no_skipped_steps": (lambda saved: saved["fused_optim"].pop("skipped_steps"), "skipped steps"),
    "negative_skipped_steps": (_set("fused_optim/skipped_steps", -3), "skipped steps"),
    "textual_skipped_steps": (_set("fused_optim/skipped_steps", "1"), "skipped steps"),
    "negative_scale": (_set("state/0/exp_avg.scale", torch.neg), "embed.weight.*damaged"),
    "complex": (_set("state/0/exp_avg", lambda x: x * 1j), "embed.weight"),
    "order": (_set("state/0/memory_order", torch.tensor([0, 0])), "memory_order.*embed.weight"),
    "order_of_another": (_set("state/0/memory_order", torch.arange(3)), "memory_order.*embed.weight"),
    "order_as_text": (_set("state/0/memory_order", "ab"), "memory_order.*embed.weight"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused_by_name(damage: Callable[[Any], Any], message: str) -> None:
    optimizer, saved = _state_dict(state_codec="int8")
    saved["state"][0].setdefault("memory_order", torch.arange(2))
    damage(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(value, before["state"][0][key]) for key, value in after["state"][0].items())


def test_a_radius_must_be_a_tensor() -> None:
    optimizer, saved = _state_dict(spectral=Hypersphere())
    saved["state"][0]["radius"] = "a"
    with pytest.raises(ValueError, match="radius"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("given", [None, [], "state"])
def test_a_state_dict_is_a_dict(given: Any) -> None:
    optimizer, _ = _state_dict()
    with pytest.raises(TypeError, match="state dict"):
        optimizer.load_state_dict(given)


def test_an_expanded_parameter_takes_no_state() -> None:
    _, saved = _state_dict()
    target = AdamW([Parameter(torch.randn(64).expand(64, 64))])
    with pytest.raises(ValueError, match=r"share memory.*clone"):
        target.load_state_dict(saved)


@pytest.mark.parametrize("portable", [False, True])
def test_complex_and_real_states_do_not_mix(portable: bool) -> None:
    params = [Parameter(torch.randn(4, 4, dtype=dtype)) for dtype in (torch.complex64, torch.float32)]
    optimizers = [AdamW([param]) for param in params]
    for param, optimizer in zip(params, optimizers, strict=True):
        param.grad = torch.randn_like(param)
        optimizer.step()
    for source, target in (optimizers, optimizers[::-1]):
        with pytest.raises(ValueError, match="parameter 0 of group 0"):
            target.load_state_dict(source.state_dict(portable=portable))


@pytest.mark.parametrize(("saved", "now"), [("float64", "float32"), ("float32", "float64")])
def test_a_model_may_change_its_precision(saved: str, now: str) -> None:
    values = torch.randn(16, 16, dtype=torch.float64)
    optimizers = []
    for dtype in (saved, now):
        param = Parameter(values.to(getattr(torch, dtype)))
        param.grad = torch.ones_like(param)
        optimizers.append(AdamW([param]))
        optimizers[-1].step()
    source, target = optimizers
    target.load_state_dict(source.state_dict())
    (state,), (theirs,) = (list(optimizer.state.values()) for optimizer in (target, source))
    assert state["exp_avg"].dtype == getattr(torch, now)
    torch.testing.assert_close(state["exp_avg"], theirs["exp_avg"].to(state["exp_avg"].dtype))


def test_names_stay_those_of_the_process() -> None:
    """Wrappers put prefixes before them, and patterns are meant for what is there now."""
    saved = AdamW([("module.embed.weight", Parameter(torch.randn(64, 64)))], keep_fp32="module.embed*")
    weight = Parameter(torch.randn(64, 64))
    target = AdamW([("embed.weight", weight)], keep_fp32="embed*", state_codec="int8")
    weight.grad = torch.randn(64, 64)
    target.load_state_dict(saved.state_dict())
    target.step()
    assert target.param_groups[0]["param_names"] == ["embed.weight"]
    assert target.state[weight]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("cls", [Lion, fused_optim.SGD, Muon])
def test_others_may_keep_no_count(cls: Any) -> None:
    """Neither lion-pytorch nor torch's SGD and Muon save one."""
    optimizer, saved = _state_dict(cls, lr=0.1, **({} if cls is Lion else {"momentum": 0.9}))
    plain = optimizer.state_dict(portable=True)
    plain["state"][0].pop("step", None)
    optimizer.load_state_dict(plain)
    del saved["state"][0]["step"]
    with pytest.raises(ValueError, match="step count"):
        optimizer.load_state_dict(saved)
