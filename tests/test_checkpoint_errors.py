"""State dicts of another model, optimizer, codec or format are refused before anything changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fused_optim
from tests import checkpointing
from tests.cases import normal
from tests.checkpointing import SHAPES


def _other_shapes() -> dict[str, Any]:
    params = [Parameter(normal(tuple(s + 1 for s in shape), torch.float32, 1)) for shape in SHAPES]
    optimizer = fused_optim.AdamW(params)
    checkpointing.train(optimizer, params, range(3))
    return optimizer.state_dict()


def _of(optimizer_class: Any, params: list[Parameter], **options: Any) -> dict[str, Any]:
    optimizer = optimizer_class(params, **options)
    checkpointing.train(optimizer, params, range(3))
    return optimizer.state_dict()


def _two_groups() -> dict[str, Any]:
    params = checkpointing.params()
    return fused_optim.AdamW([{"params": params[:2]}, {"params": params[2:]}]).state_dict()


def _future() -> dict[str, Any]:
    saved = _of(fused_optim.AdamW, checkpointing.params())
    saved["fused_optim"]["format"] = 99
    return saved


def _without(key: str) -> dict[str, Any]:
    saved = copy.deepcopy(_of(fused_optim.AdamW, checkpointing.params()))
    del saved["state"][1][key]
    return saved


def _replaced(key: str, value: Any) -> dict[str, Any]:
    saved = copy.deepcopy(_of(fused_optim.AdamW, checkpointing.params()))
    saved["param_groups"][0][key] = value
    return saved


def _damaged(change: Any) -> dict[str, Any]:
    saved = copy.deepcopy(_of(fused_optim.AdamW, checkpointing.params()))
    change(saved)
    return saved


REFUSED: dict[str, tuple[Any, str]] = {
    "another_codec": (
        lambda: _of(fused_optim.AdamW, checkpointing.params(), state_codec="bf16"),
        r"parameter 0 of group 0.*bf16.*state_codec.*portable",
    ),
    "another_mapping": (
        lambda: _of(fused_optim.AdamW, checkpointing.params(), state_codec={"exp_avg_sq": "fp16"}),
        r"parameter 0 of group 0.*state_codec.*portable",
    ),
    "another_model": (_other_shapes, r"exp_avg.*parameter 0 of group 0.*\(4, 6\).*\(3, 5\).*another model"),
    "fewer_parameters": (
        lambda: _of(fused_optim.AdamW, checkpointing.params()[:3]),
        r"group 0 has 3 parameters .*4 here",
    ),
    "more_groups": (_two_groups, r"number of parameter groups.*2.*1"),
    "lion": (
        lambda: _of(fused_optim.Lion, checkpointing.params()),
        r"\['exp_avg'\].*parameter 0 of group 0.*exp_avg_sq.*another optimizer",
    ),
    "sgd": (
        lambda: _of(fused_optim.SGD, checkpointing.params(), momentum=0.9),
        r"momentum_buffer.*parameter 0 of group 0",
    ),
    "amsgrad_states_missing": (
        lambda: _replaced("amsgrad", True),
        r"parameter 0 of group 0.*max_exp_avg_sq",
    ),
    "a_missing_state": (lambda: _without("exp_avg_sq"), r"\['exp_avg'\].*parameter 1 of group 0"),
    "a_later_format": (_future, r"format 99.*update"),
    "no_state": (lambda: _damaged(lambda d: d.pop("state")), r"'state'.*a dict.*nothing"),
    "no_groups": (lambda: _damaged(lambda d: d.pop("param_groups")), r"'param_groups'.*a list.*nothing"),
    "no_params": (lambda: _damaged(lambda d: d["param_groups"][0].pop("params")), r"group 0.*'params'"),
    "no_entry": (lambda: _damaged(lambda d: d["state"].update({0: None})), r"NoneType.*parameter 0.*dict"),
    "a_word_as_step": (
        lambda: _damaged(lambda d: d["state"][1].update(step="a")),
        r"step count of parameter 1 of group 0 is 'a'",
    ),
    "two_steps": (
        lambda: _damaged(lambda d: d["state"][1].update(step=torch.ones(2))),
        r"step count of parameter 1 of group 0",
    ),
    "a_parameter_twice": (lambda: _replaced("params", [0, 0, 1, 2]), r"parameters \[0\] more than once"),
    "no_format": (lambda: _damaged(lambda d: d["fused_optim"].pop("format")), r"'fused_optim'.*damaged"),
    "bad_lr": (lambda: _replaced("lr", -1.0), r"learning rate"),
    "bad_betas": (lambda: _replaced("betas", (0.9, 1.5)), r"beta"),
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "new"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_changes(name: str, trained: bool) -> None:
    make, message = REFUSED[name]
    saved = make()
    optimizer = checkpointing.groups() if trained else fused_optim.AdamW(checkpointing.params(), lr=0.01)
    before = checkpointing.frozen(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert checkpointing.frozen(optimizer) == before
    params = optimizer.param_groups[0]["params"]
    checkpointing.train(optimizer, params, range(3, 4))


def test_named_parameters_name_the_parameter_in_errors() -> None:
    optimizer = fused_optim.AdamW(
        [("embedding", Parameter(torch.ones(2))), ("head", Parameter(torch.ones(3)))]
    )
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(4))]
    saved = _of(fused_optim.AdamW, params)
    with pytest.raises(ValueError, match="head"):
        optimizer.load_state_dict(saved)


def _saved(codec: str) -> tuple[dict[str, Any], fused_optim.AdamW]:
    named = [
        (name, Parameter(normal(n, torch.float32, n))) for name, n in (("first", 4100), ("second", 5000))
    ]
    optimizer = fused_optim.AdamW(copy.deepcopy(named), state_codec=codec)
    checkpointing.train(optimizer, optimizer.param_groups[0]["params"], range(3))
    return optimizer.state_dict(), fused_optim.AdamW(named, state_codec=codec)


def _damage(key: str, change: Any) -> Any:
    def damage(saved: dict[str, Any]) -> None:
        saved["state"][1][key] = change(saved["state"][1][key])

    return damage


@pytest.mark.parametrize("codec", ["int8", "int8_companded", "fp8", "int4"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage("exp_avg.scale", lambda scale: scale[:-1]), r"exp_avg.scale.*second.*shape.*expected"),
        (_damage("exp_avg_sq", lambda codes: codes[:-7]), r"exp_avg_sq.*second.*shape"),
        (
            _damage("exp_avg_sq.scale", lambda s: s * float("nan")),
            r"exp_avg_sq.scale.*second.*NaN or infinite",
        ),
        (_damage("exp_avg", lambda codes: codes.float()), r"second.*adam keeps.*damaged"),
        (lambda saved: saved["state"][1].pop("exp_avg.scale"), r"exp_avg.*second.*damaged"),
    ],
    ids=["scales", "codes", "nan", "dtype", "missing"],
)
def test_damaged_planes_are_refused(codec: str, damage: Any, message: str) -> None:
    saved, optimizer = _saved(codec)
    damage(saved)
    before = checkpointing.frozen(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert checkpointing.frozen(optimizer) == before


def test_codes_without_their_codec_are_refused() -> None:
    saved, optimizer = _saved("int8")
    del saved["fused_optim"]
    for group in saved["param_groups"]:
        del group["state_codec"]
    with pytest.raises(ValueError, match="first"):
        optimizer.load_state_dict(saved)


def test_codes_whose_group_names_another_codec_are_refused() -> None:
    """Without our own entry the groups say what codes are; fp8 and int8 have the same dtypes."""
    saved, _ = _saved("fp8")
    _, optimizer = _saved("int8")
    del saved["fused_optim"]
    with pytest.raises(ValueError, match=r"first.*'fp8'.*'int8'"):
        optimizer.load_state_dict(saved)
