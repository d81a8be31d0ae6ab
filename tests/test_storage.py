"""What the user says about storage: whose states stay in fp32, presets, weights with all their bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Parameter, Sequential

import fused_optim
from fused_optim import full_precision, keep_fp32, set_full_precision
from fused_optim.kernels.codecs import CODECS
from tests import checkpointing
from tests.cases import assert_same_bits, normal


def _param(numel: int, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(normal(numel, dtype, numel))


def _stepped(params: Any, **options: Any) -> fused_optim.AdamW:
    optimizer = fused_optim.AdamW(params, **options)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = normal(tuple(param.shape), param.dtype, 3)
    optimizer.step()
    return optimizer


def _dtypes(optimizer: fused_optim.AdamW) -> list[torch.dtype]:
    return [optimizer.state[p]["exp_avg"].dtype for group in optimizer.param_groups for p in group["params"]]


NARROW, FULL = torch.uint8, torch.float32
NAMES = ("embed.weight", "layer.weight", "head.weight")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (4096, [FULL, NARROW, NARROW]),
        (0, [NARROW, NARROW, NARROW]),
        (5000, [FULL, FULL, NARROW]),
        ("*head*", [NARROW, NARROW, FULL]),
        ((4096, "head.*"), [FULL, NARROW, FULL]),
        ((), [NARROW, NARROW, NARROW]),
        (lambda name, param: param.numel() > 5000 or "layer" in name, [NARROW, FULL, FULL]),
    ],
    ids=["default", "none", "size", "pattern", "both", "empty", "function"],
)
def test_keep_fp32(rule: Any, expected: list[torch.dtype]) -> None:
    params = [_param(4095), _param(4096), _param(6000)]
    assert (
        _dtypes(_stepped(list(zip(NAMES, params, strict=True)), state_codec="int8", keep_fp32=rule))
        == expected
    )


def test_keep_fp32_per_group_and_by_mark() -> None:
    embedding, linear = Embedding(100, 64), Linear(100, 64, bias=False)
    keep_fp32(embedding)
    groups = [
        {"params": [embedding.weight, linear.weight]},
        {"params": [_param(5000)], "keep_fp32": 10_000},
    ]
    assert _dtypes(_stepped(groups, state_codec="int8")) == [FULL, NARROW, FULL]


def test_keep_fp32_leaves_other_codecs_alone() -> None:
    optimizer = _stepped([_param(10)], state_codec="bf16")
    assert _dtypes(optimizer) == [torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "base", "codec"),
    [
        ("AdamW8bit", "AdamW", "int8"),
        ("Adam8bit", "Adam", "int8"),
        ("Lion8bit", "Lion", "int8"),
        ("AdamW4bit", "AdamW", "int4"),
        ("Lion4bit", "Lion", "int4"),
    ],
)
def test_presets_are_their_classes_with_a_default(name: str, base: str, codec: str) -> None:
    preset_class, base_class = getattr(fused_optim, name), getattr(fused_optim, base)
    assert issubclass(preset_class, base_class)
    params, others = [_param(5000)], [_param(5000)]
    preset = preset_class(params, lr=0.01)
    explicit = base_class(others, lr=0.01, state_codec=codec)
    checkpointing.train(preset, params, range(3))
    checkpointing.train(explicit, others, range(3))
    checkpointing.assert_same_training(preset, params, explicit, others)
    assert preset_class([_param(5)], state_codec="bf16").param_groups[0]["state_codec"] == "bf16"


def test_stable_embedding() -> None:
    embedding = fused_optim.StableEmbedding(200, 64, padding_idx=3)
    model = Sequential(embedding, Linear(64, 64))
    out = model(torch.tensor([[1, 2, 3]]))
    assert out.shape == (1, 3, 64)
    assert (embedding.weight[3] == 0).all() and embedding.weight.abs().max() <= (6 / 264) ** 0.5
    normalised = embedding(torch.arange(200))
    assert normalised[4:].mean(1).abs().max() < 1e-5
    for module in (model, copy.deepcopy(model)):
        module(torch.arange(200)).square().sum().backward()
        optimizer = fused_optim.AdamW8bit(module.parameters())
        optimizer.step()
        assert _dtypes(optimizer)[0] == FULL
        assert optimizer.state[module[1].weight]["exp_avg"].dtype == NARROW


PARAM_CODECS = [
    ("bf16_split16", 0.0),
    ("bf16_split8", 2.0**-16),
    ("bf16_kahan", 2.0**-17),
    ("bf16_sr", 2.0**-7),
]


@pytest.mark.parametrize(("codec", "error"), PARAM_CODECS)
def test_weights_in_full_precision(codec: str, error: float) -> None:
    param = Parameter(torch.zeros(40, 30, dtype=torch.bfloat16).t())
    values = normal((30, 40), torch.float32, 1)
    optimizer = fused_optim.AdamW([param], param_codec=codec, lr=0.0, weight_decay=0.0)
    assert_same_bits(full_precision(optimizer, param), param.detach().float())
    set_full_precision(optimizer, param, values)
    param.grad = torch.ones_like(param)
    for _ in range(2):
        stored = full_precision(optimizer, param)
        assert ((stored - values).abs() <= error * values.abs()).all()
        optimizer.step()
        assert_same_bits(full_precision(optimizer, param), stored)
    with pytest.raises(ValueError, match="'exp_avgs' is not kept by AdamW; allowed: param, exp_avg"):
        full_precision(optimizer, param, "exp_avgs")
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        full_precision(optimizer, torch.zeros(2))
    with pytest.raises(ValueError, match=r"shape \(3,\) for a parameter of \(30, 40\)"):
        set_full_precision(optimizer, param, torch.zeros(3))


def test_full_precision_follows_the_fp32_run_bit_for_bit() -> None:
    """bf16_split16 is an fp32 master weight in 2 + 2 bytes."""
    values = normal((50, 40), torch.float32, 2)
    master = Parameter(values.clone())
    split = Parameter(values.bfloat16())
    fp32 = fused_optim.AdamW([master], lr=1e-3)
    ours = fused_optim.AdamW([split], lr=1e-3, param_codec="bf16_split16")
    set_full_precision(ours, split, values)
    for step in range(5):
        gradient = normal((50, 40), torch.bfloat16, step)
        master.grad, split.grad = gradient.float(), gradient
        fp32.step()
        ours.step()
    assert_same_bits(full_precision(ours, split), master.detach())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_random_rounding_depends_on_the_seed_and_resumes(backend: str) -> None:
    def run(seed: int, split: int | None = None) -> Tensor:
        param = Parameter(normal(5000, torch.bfloat16, 1))
        options: dict[str, Any] = {
            "param_codec": "bf16_sr",
            "state_codec": "bf16_sr",
            "lr": 1e-3,
            "seed": seed,
        }
        optimizer = fused_optim.AdamW([param], backend=backend, **options)
        for step in range(4):
            if step == split:
                saved, param = optimizer.state_dict(), Parameter(param.detach().clone())
                optimizer = fused_optim.AdamW([param], backend=backend, **{**options, "seed": 999})
                optimizer.load_state_dict(saved)
            checkpointing.train(optimizer, [param], range(step, step + 1))
        return param.detach()

    assert_same_bits(run(5), run(5))
    assert_same_bits(run(5, split=2), run(5))
    assert not torch.equal(run(5), run(6))


def _saved(codec: str) -> tuple[dict[str, Any], fused_optim.AdamW]:
    optimizer = _stepped([("first", _param(4100)), ("second", _param(5000))], state_codec=codec)
    return copy.deepcopy(optimizer.state_dict()), fused_optim.AdamW(
        [("first", _param(4100)), ("second", _param(5000))], state_codec=codec
    )


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
    with pytest.raises(ValueError, match="first"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("codec", ["int8", "int8_companded", "int4"])
def test_blocks_follow_the_memory_of_the_parameter(codec: str) -> None:
    """Blocks run through memory; a parameter that lies otherwise gets its states encoded anew."""
    values = normal((8, 16, 6, 7), torch.float32, 1)
    before = Parameter(values.clone())
    after = Parameter(values.clone().to(memory_format=torch.channels_last))
    saving = _stepped([before], state_codec=codec)
    loading = fused_optim.AdamW([after], state_codec=codec)
    loading.load_state_dict(checkpointing.written_and_read(saving.state_dict()))
    for name in ("exp_avg", "exp_avg_sq"):
        old, new = full_precision(saving, before, name), full_precision(loading, after, name)
        assert (old - new).abs().max() <= 1.1 * CODECS[codec].relative_error * old.abs().max()
        assert (old - new).norm() <= 0.2 * old.norm()
    back = fused_optim.AdamW([Parameter(values.clone())], state_codec=codec)
    back.load_state_dict(loading.state_dict())
    back.param_groups[0]["params"][0].grad = torch.ones_like(values)
    back.step()


def test_what_keep_fp32_says_may_change_between_saving_and_loading() -> None:
    param, other = _param(5000), _param(5000)
    saving = _stepped([param], state_codec="int8")
    loading = fused_optim.AdamW([other], state_codec="int8", keep_fp32=10_000)
    loading.load_state_dict(saving.state_dict())
    assert_same_bits(loading.state[other]["exp_avg"], full_precision(saving, param, "exp_avg"))
    again = fused_optim.AdamW([param], state_codec="int8")
    again.load_state_dict(loading.state_dict())
    moved = full_precision(again, param, "exp_avg") - loading.state[other]["exp_avg"]
    assert moved.abs().max() <= 0.0071 * loading.state[other]["exp_avg"].abs().max()


def test_low_bits_need_the_codec_that_wrote_them() -> None:
    param, other = _param(5000, torch.bfloat16), _param(5000, torch.bfloat16)
    saving = _stepped([("w", param)], param_codec="bf16_split8")
    plain = fused_optim.AdamW([("w", other)])
    with pytest.raises(ValueError, match=r"'w'.*bf16_split8.*param_codec.*portable"):
        plain.load_state_dict(saving.state_dict())
    plain.load_state_dict(saving.state_dict(portable=True))
    split = fused_optim.AdamW([("w", other)], param_codec="bf16_split8")
    split.load_state_dict(plain.state_dict())
    other.grad = torch.ones_like(other)
    split.step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state_codec": "int9"}, ValueError, r"state_codec='int9' is unknown; allowed: auto, fp32"),
        ({"state_codec": "int8_unsigned"}, ValueError, r"is unknown"),
        ({"param_codec": "int8"}, ValueError, r"param_codec='int8' is unknown; allowed: auto, fp32"),
        ({"param_codec": "bf16_split8"}, ValueError, r"does not fit parameter 0 of group 0.*float32.*'fp32'"),
        ({"keep_fp32": 1.5}, TypeError, r"keep_fp32 must be a number of elements, a name pattern.*1.5"),
        ({"keep_fp32": -1}, ValueError, r"keep_fp32=-1: a number of elements cannot be negative"),
        ({"keep_fp32": [None]}, TypeError, r"keep_fp32 must be"),
        ({"seed": -1}, ValueError, r"seed=-1 is out of range; allowed: 0 to"),
        ({"seed": 1 << 32}, ValueError, r"out of range"),
        ({"seed": 1.0}, TypeError, r"seed must be an integer, got 1.0"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_optim.AdamW([_param(10)], **options)
