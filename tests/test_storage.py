"""What the user says about storage: whose states stay in fp32, presets, weights with all their bits."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Parameter, Sequential

import fused_optim
from fused_optim import full_precision, keep_fp32, set_full_precision
from fused_optim.kernels.codecs import CODECS
from fused_optim.sparsity import SRSTE
from fused_optim.spectral import Hypersphere
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


@pytest.mark.parametrize("parts", [(0, 1), (1, 0)], ids=["model first", "optimizer first"])
def test_marks_survive_copies(parts: tuple[int, int]) -> None:
    """copy.deepcopy of a parameter drops its attributes: the copied optimizer refused its own states."""
    model = Sequential(keep_fp32(Embedding(100, 64)), Linear(100, 64, bias=False))
    optimizer = _stepped(model.parameters(), state_codec="int8")
    pair: Any = (model, optimizer)
    copied = copy.deepcopy([pair[part] for part in parts])
    second, other = (copied[part] for part in parts)
    assert [a is b for a, b in zip(second.parameters(), other.param_groups[0]["params"], strict=True)] == [
        True,
        True,
    ]
    other.step()
    assert _dtypes(other) == [FULL, NARROW]
    for again in (copy.deepcopy(second), pickle.loads(pickle.dumps(second)), copy.deepcopy(second)[:1]):
        for module in (again, copy.deepcopy(again)):
            assert _dtypes(_stepped(module.parameters(), state_codec="int8"))[0] == FULL
    for alone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for param in alone.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        alone.step()
        assert _dtypes(alone) == [FULL, NARROW]


def test_marks_keep_no_parameter_alive() -> None:
    """fully_shard puts others in their place, and the memory of the whole must go."""
    embedding = keep_fp32(Embedding(10, 4))
    gone = weakref.ref(embedding.weight)
    embedding.weight = Parameter(torch.zeros(5, 4))
    gc.collect()
    assert gone() is None
    copy.deepcopy(embedding)


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


def test_codes_without_our_entry_tell_their_order() -> None:
    before = Parameter(normal((8, 16, 6, 7), torch.float32, 1).to(memory_format=torch.channels_last))
    after = Parameter(before.detach().contiguous())
    saving, loading = _stepped([before], state_codec="int8"), fused_optim.AdamW([after], state_codec="int8")
    saved = saving.state_dict()
    whole = fused_optim.AdamW([Parameter(after.detach().clone())], state_codec="int8")
    whole.load_state_dict(saved)
    del saved["fused_optim"]
    loading.load_state_dict(saved)
    assert_same_bits(
        loading.state[after]["exp_avg.scale"],
        whole.state[whole.param_groups[0]["params"][0]]["exp_avg.scale"],
    )


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


def test_values_outlast_decoding_and_encoding() -> None:
    """The signed map has no -1: blocks led by a negative value lost 0.7 % each time they were encoded."""
    param = _param(30 * 256 + 77)
    optimizer = _stepped([param], state_codec="int8")
    decoded = full_precision(optimizer, param, "exp_avg")
    starts = range(0, param.numel(), 256)
    assert any(-decoded[i : i + 256].min() > decoded[i : i + 256].max() for i in starts)
    for _ in range(30):
        optimizer.load_state_dict(optimizer.state_dict(portable=True))
    assert_same_bits(full_precision(optimizer, param, "exp_avg"), decoded)
    # What never was in a block is encoded as kernels do it.
    fresh, kernel = (fused_optim.Lion([_param(8192)], betas=(0.0, 0.0), state_codec="int8") for _ in range(2))
    values = normal(8192, torch.float32, 7)
    held, other = fresh.param_groups[0]["params"][0], kernel.param_groups[0]["params"][0]
    other.grad = values
    kernel.step()
    group = kernel.state_dict(portable=True)["param_groups"]
    fresh.load_state_dict({"state": {0: {"exp_avg": values, "step": 1}}, "param_groups": group})
    for key in ("exp_avg", "exp_avg.scale"):
        assert_same_bits(fresh.state[held][key], kernel.state[other][key], key)


def test_entries_of_the_user_stay() -> None:
    param = _param(5000)
    optimizer = _stepped([param], state_codec="int8")
    optimizer.state[param] |= {"ema": torch.arange(3), "note": "mine"}
    optimizer.load_state_dict(checkpointing.written_and_read(optimizer.state_dict()))
    found = optimizer.state[param]
    assert found["ema"].tolist() == [0, 1, 2] and found["note"] == "mine" and found["exp_avg"].dtype == NARROW
    optimizer.step()
    saved = optimizer.state_dict(portable=True)
    with pytest.raises(ValueError, match=r"'ema'.*another optimizer"):
        optimizer.load_state_dict(saved)
    held = _stepped([("w", Parameter(torch.ones(4, 4)))], spectral=Hypersphere())
    plain = fused_optim.AdamW([("w", Parameter(torch.ones(4, 4)))])
    with pytest.raises(ValueError, match=r"'radius'.*other options"):
        plain.load_state_dict(held.state_dict())


HELPED: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "AdamW": (fused_optim.AdamW, torch.float32, {}),
    "AdamW8bit": (fused_optim.AdamW8bit, torch.float32, {}),
    "AdamW4bit": (fused_optim.AdamW4bit, torch.float32, {}),
    "Lion8bit": (fused_optim.Lion8bit, torch.float32, {"keep_fp32": lambda name, param: param.ndim < 2}),
    "split8": (fused_optim.AdamW, torch.bfloat16, {"param_codec": "bf16_split8", "state_codec": "int8"}),
    "kahan": (fused_optim.AdamW, torch.bfloat16, {"param_codec": "bf16_kahan"}),
    "masks": (fused_optim.AdamW, torch.float32, {"sparsity": SRSTE(), "state_codec": {"exp_avg": "fp8"}}),
}


@pytest.mark.parametrize("how", ["", "full_state_dict", "flatten_optimizer_state_dict"])
@pytest.mark.parametrize("name", HELPED)
def test_distributed_helpers_keep_planes(name: str, how: str) -> None:
    """They pass on nothing but states and groups; flat, they want every option of a group."""
    cls, dtype, options = HELPED[name]
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).to(dtype)
    found = checkpointing.through_helpers(model, lambda p: cls(p, **options), **({how: True} if how else {}))
    checkpointing.assert_same_training(found[2], found[3], found[0], found[1])


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


def test_modules_come_when_asked_for() -> None:
    assert fused_optim.interchange.from_bitsandbytes is not None
    with pytest.raises(AttributeError, match="nothing"):
        getattr(fused_optim, "nothing")  # noqa: B009
