"""The memory planner: its bytes are the optimizer's bytes, its presets the published models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_optim
from fused_optim import FusedOptimizer
from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.spec import Rule
from fused_optim.precision import keep_fp32
from fused_optim.sparsity import CAST, SRSTE
from fused_optim.training import Memory, Storage, plan, plan_report
from fused_optim.training.config import resolve
from fused_optim.training.peers import PEERS
from fused_optim.training.planner import CARDS, DEFAULT_STORAGES
from fused_optim.training.presets import PRESETS
from fused_optim.training.sparse import RECIPES, build_recipe
from tests import cases

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {
    "embedding.weight": (61, 83),
    "below": (4095,),
    "at": (64, 64),
    "above": (4097,),
    "odd": (3, 5, 7),
    "one": (1,),
    "scalar": (),
    "empty": (0, 4),
}


class _AnyRule(FusedOptimizer):
    """The optimizer of any rule in the catalogue."""

    def __init__(self, params: Any, rule: Rule, **options: Any) -> None:
        flags = dict.fromkeys(("maximize", "capturable", "differentiable"), False)
        defaults = {**cases.hypers(rule)[0], **flags, "foreach": None, "fused": None}
        del defaults["seed"]
        self.rule = rule
        super().__init__(params, defaults, {"backend": "reference", **options})

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return self.rule


class _Model(nn.Module):
    """Parameters of the sizes where something changes, one of them transposed in memory."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(*SHAPES["embedding.weight"])
        for name, shape in SHAPES.items():
            if "." not in name:
                self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        self.transposed = nn.Parameter(torch.ones(70, 65).t())
        self.to(dtype)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, grad_dtype: torch.dtype | None = None) -> None:
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.full_like(param, 0.5, dtype=grad_dtype)
    optimizer.step()


_ON_CPU = {"step", "memory_order"}


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = optimizer.state.values()
    return sum(
        value.nbytes
        for state in states
        for key, value in state.items()
        if key not in _ON_CPU and _stored(value)
    )


def _stored(value: Any) -> bool:
    return isinstance(value, Tensor)


def _predicted(model: nn.Module, rule: str, how: Storage, **options: Any) -> Memory:
    (entry,) = plan(model, rules=[rule], storages=[how], peers=False, **options).entries
    return entry.memory


@pytest.mark.parametrize("case", cases.representative_cases(), ids=lambda case: case.id)
def test_predicted_bytes_are_the_measured_ones(case: cases.Case) -> None:
    """Every storage of parameters and of each state at least once, mixed."""
    slots = zip(case.rule.slots, case.states, strict=True)
    states = {slot.name: codec.name.removesuffix("_unsigned") for slot, codec in slots}
    model = _Model(cases.DTYPES[case.param.name])
    params = dict(model.named_parameters())
    optimizer = _AnyRule(params.items(), case.rule, param_codec=case.param.name, state_codec=states)
    _step(model, optimizer)
    memory = _predicted(_Model(), case.rule.name, Storage("case", case.param.name, states))
    assert memory.master + memory.states == _state_bytes(optimizer)
    assert memory.weights == sum(p.nbytes for p in params.values())
    assert memory.gradients == sum(p.grad.nbytes for p in params.values() if p.grad is not None)
    beside = {"param" + plane.suffix for plane in case.param.planes[1:]}
    assert memory.master == sum(optimizer.state[p][key].nbytes for p in params.values() for key in beside)


@pytest.mark.parametrize("how", DEFAULT_STORAGES)
@pytest.mark.parametrize("cls", [fused_optim.AdamW, fused_optim.Lion], ids=lambda cls: cls.__name__)
def test_default_storages_are_the_optimizers(cls: Any, how: str) -> None:
    chosen = Storage.parse(how)
    model = _Model(torch.float32 if chosen.param_codec == "fp32" else torch.bfloat16)
    codecs = {"param_codec": chosen.param_codec, "state_codec": chosen.state_codec}
    optimizer = cls(model.parameters(), **codecs, backend="reference")
    _step(model, optimizer)
    memory = _predicted(_Model(), {"AdamW": "adamw", "Lion": "lion"}[cls.__name__], chosen)
    assert memory.master + memory.states == _state_bytes(optimizer)


class _Sparse(nn.Module):
    """Parameters that recipes mask, and some that they leave dense."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        sizes = {
            "embed_tokens": (64, 64),
            "proj": (68, 64),
            "odd": (66, 64),
            "narrow": (64, 66),
            "norm": (64,),
        }
        sizes |= {"experts": (3, 8, 12), "kernel": (8, 8, 3, 3)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.rand(size)))
        self.transposed = nn.Parameter(torch.rand(72, 68).t())
        self.to(dtype)


CLASSES: dict[str, Any] = {
    "muon": partial(fused_optim.Muon, others="adamw"),
    "normuon": partial(fused_optim.NorMuon, others="adamw"),
    "muonh": partial(fused_optim.MuonH, others="adamw"),
    "adamh": fused_optim.AdamH,
}


class _Layers(nn.Module):
    """What Muon and its relatives tell apart: hidden matrices, stacks, convolutions, and all others."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        sizes = {"proj": (68, 64), "experts": (3, 40, 36), "kernel": (64, 8, 3, 3), "small": (5, 7)}
        sizes |= {"column": (9, 1), "empty": (0, 4), "norm": (5000,), "scalar": ()}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.rand(size)))
        self.embed_tokens, self.lm_head = nn.Embedding(70, 64), nn.Linear(64, 70)
        self.transposed = nn.Parameter(torch.rand(72, 68).t())
        self.frozen = nn.Parameter(torch.rand(64, 64), requires_grad=False)
        self.to(dtype)


@pytest.mark.parametrize("sparsity", [None, SRSTE()], ids=["dense", "sparse"])
@pytest.mark.parametrize("how", ["fp32", "split8+int8", "kahan+int4"])
@pytest.mark.parametrize("name", CLASSES)
def test_classes_keep_what_is_predicted(name: str, how: str, sparsity: Any) -> None:
    chosen = Storage.parse(how)
    model = _Layers(torch.float32 if how == "fp32" else torch.bfloat16)
    codecs = {"param_codec": chosen.param_codec, "state_codec": chosen.state_codec}
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    optimizer = CLASSES[name](trained, **codecs, sparsity=sparsity, backend="reference")
    _step(model, optimizer)
    memory = _predicted(_Layers(), name, chosen, sparsity=sparsity)
    assert memory.master + memory.states == _state_bytes(optimizer)
    beside = {"param" + plane.suffix for plane in CODECS[chosen.param_codec].planes[1:]}
    beside |= {key for state in optimizer.state.values() for key in state if key.startswith("dense")}
    found = [state[key].nbytes for state in optimizer.state.values() for key in beside & set(state)]
    assert memory.master == sum(found)
    shared = {"muon": set(), "normuon": {"row_second_moment"}}.get(name, {"radius"})
    assert optimizer.state[model.get_parameter("proj")].keys() & {"row_second_moment", "radius"} == shared


def test_classes_refuse_what_they_cannot_update() -> None:
    with pytest.raises(ValueError, match=r"'w'.* has dtype torch.float64; whole matrices"):
        plan(
            nn.ParameterDict({"w": torch.ones(8, 8, dtype=torch.float64)}), rules=["muonh"], storages=["auto"]
        )
    for rule in (*CLASSES, "adamw_amsgrad"):
        with pytest.raises(ValueError, match="CAST is for CASTAdamS"):
            plan({"w": (64, 64)}, rules=[rule], sparsity=CAST(total_steps=9))


def test_a_model_that_is_not_trained_keeps_its_weights() -> None:
    model = nn.Linear(8, 8).requires_grad_(False)
    for rule in ("adam", *CLASSES):
        assert _predicted(model, rule, Storage.parse("fp32")) == Memory(288, 0, 0, 0)


@pytest.mark.parametrize("how", ["fp32", "split8+int8", "kahan+int4"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_masks_and_dense_weights_are_the_optimizers(recipe: str, how: str) -> None:
    chosen, sparsity = Storage.parse(how), build_recipe(resolve({"sparsity": recipe}))
    model = _Sparse(torch.float32 if how == "fp32" else torch.bfloat16)
    model.odd.requires_grad_(False)
    cls = fused_optim.CASTAdamS if recipe == "cast" else fused_optim.AdamW
    codecs = {"param_codec": chosen.param_codec, "state_codec": chosen.state_codec}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = cls(trained, **codecs, sparsity=sparsity, backend="reference")
    _step(model, optimizer)
    memory = _predicted(model, "adamw", chosen, sparsity=sparsity)
    assert memory.master + memory.states == _state_bytes(optimizer)
    keys = {key for state in optimizer.state.values() for key in state if key.startswith(("param.", "dense"))}
    assert any(key.startswith("dense") for key in keys) == (recipe not in ("one-shot", "cast"))
    found = [state[key].nbytes for state in optimizer.state.values() for key in keys & set(state)]
    assert memory.master == sum(found)
    masks = [state["mask"].numel() for state in optimizer.state.values() if "mask" in state]
    assert len(masks) == (3 if recipe == "masked-decay" else 4)


def test_recipes_that_do_not_fit() -> None:
    for message, options in {
        "masks no parameter: none is meant": {"rules": ["lion"], "sparsity": SRSTE()},
        "is for CASTAdamS, which keeps what 'adam' keeps": {"sparsity": CAST(total_steps=9)},
    }.items():
        with pytest.raises(ValueError, match=message):
            plan({"norm": (64,)}, **options)
    with pytest.raises(TypeError, match="sparsity must be a recipe"):
        plan({"w": (64, 64)}, sparsity="sr-ste")


def _named(name: str, param: Tensor) -> bool:
    return name == "above" and param.ndim == 1


@pytest.mark.parametrize("rule", [0, 5000, "embed*", [4097, "*at"], _named])
def test_the_rule_of_fp32_states_is_the_optimizers(rule: Any) -> None:
    model = _Model(torch.bfloat16)
    optimizer = fused_optim.AdamW(
        model.named_parameters(), state_codec="int8", keep_fp32=rule, backend="reference"
    )
    _step(model, optimizer)
    memory = _predicted(_Model(), "adamw", Storage.parse("bf16+int8"), keep_fp32=rule)
    assert memory.states == _state_bytes(optimizer)


def test_marked_frozen_and_tied_parameters() -> None:
    model = _Model()
    keep_fp32(model.embedding)
    model.above.requires_grad_(False)
    model.again = model.at
    how = {"exp_avg": "int8", "exp_avg_sq": "fp8"}
    optimizer = fused_optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], state_codec=how, backend="reference"
    )
    _step(model, optimizer)
    memory = _predicted(model, "adam", Storage("as it is", "auto", how))
    assert memory.states == _state_bytes(optimizer)
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == memory.weights - 4 * 4097
    assert _predicted(model, "adam", Storage("bf16", "bf16", how)).states == memory.states


def test_modules_of_other_dtypes() -> None:
    model = nn.Module()
    model.f64 = nn.Parameter(torch.ones(5000, dtype=torch.float64))
    model.c64 = nn.Parameter(torch.ones(50, 100, dtype=torch.complex64))
    model.f16 = nn.Parameter(torch.ones(5000, dtype=torch.float16))
    optimizer = fused_optim.AdamW(model.parameters(), backend="reference")
    _step(model, optimizer)
    assert _predicted(model, "adam", Storage("as it is")).states == _state_bytes(optimizer)
    with pytest.raises(ValueError, match=r"f64 \(torch.float64\): such parameters keep their states"):
        _predicted(model, "adam", Storage("as it is", "auto", "int8"))
    with pytest.raises(ValueError, match=r"does not fit c64 of dtype torch.complex64"):
        _predicted(model, "adam", Storage.parse("split8"))


def test_gradients_of_another_dtype() -> None:
    shapes = {"weight": (100, 100)}
    for name, size in {None: 2, "fp32": 4, "bf16": 2, "fp16": 2}.items():
        found = plan(shapes, rules=["lion"], storages=["split8"], grad_dtype=name, peers=False)
        assert found.entries[0].memory.gradients == size * 10_000
    double = nn.Linear(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the gradient of weight .* for a parameter of .* torch.float64"):
        plan(double, storages=[Storage("as it is")], grad_dtype="bf16")


def test_presets_have_the_published_sizes() -> None:
    sizes = {
        name: sum(math.prod(size) for size in shape.tensors().values()) for name, shape in PRESETS.items()
    }
    assert sizes == {
        "124m": 123_551_232,
        "350m": 353_896_448,
        "1b": 1_100_048_384,
        "3b": 3_212_749_824,
        "7b": 6_738_415_616,
        "8b": 8_030_261_248,
        "13b": 13_015_864_320,
        "70b": 68_976_648_192,
    }


GOALS = {
    ("adamw", "split8+int8"): (5.07, 5_535_168_512),
    ("adamw", "split8+int8_companded"): (5.07, 5_569_542_144),
    ("adamw", "split8+int4"): (4.1, 4_469_585_920),
    ("lion", "split8+int8"): (4.02, 4_417_656_832),
}


@pytest.mark.parametrize("case", GOALS, ids="-".join)
def test_goals(case: tuple[str, str]) -> None:
    """What stays between two steps of TinyLlama: bytes per parameter, and the number itself."""
    rule, how = case
    most, exact = GOALS[case]
    found = plan(PRESETS["1b"].tensors(), rules=[rule], storages=[how], peers=False)
    assert found.entries[0].memory.kept == exact
    assert exact / found.parameters <= most


def test_shares_are_even_and_rounded_up() -> None:
    memory = Memory(weights=100, master=17, gradients=101, states=33)
    assert memory.on_each(8, "none") == memory
    assert memory.on_each(8, "states") == Memory(100, 3, 101, 5)
    assert memory.on_each(8, "all") == Memory(13, 3, 13, 5)
    assert (memory.kept, memory.total) == (150, 251)


def test_cards() -> None:
    found = plan(PRESETS["8b"].tensors(), rules=["adam"], storages=["fp32", "split8+int8", "sr+int4"])
    assert [entry.fits for entry in found.entries[:3]] == [(141,), (80, 141), (48, 80, 141)]
    exactly = plan({"weight": (24 * 10**9 // 16,)}, rules=["adam"], storages=["fp32"], peers=False)
    above = plan({"weight": (24 * 10**9 // 16 + 1,)}, rules=["adam"], storages=["fp32"], peers=False)
    assert (exactly.entries[0].fits, above.entries[0].fits) == (CARDS, CARDS[1:])
    many = plan({"weight": (1 << 40,)}, rules=["sgd"], storages=["fp32"], gpus=8, shard="all", peers=False)
    assert many.entries[0].fits == ()
    assert plan_report.smallest_card(many.entries[0]) == "> 141 GB"


def test_torch_keeps_what_its_row_says() -> None:
    model = _Model()
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer)
    sizes = [param.numel() for param in model.parameters()]
    assert _state_bytes(optimizer) == 2 * PEERS["torch AdamW fp32"].state.stored(sizes)


@pytest.mark.slow
def test_bitsandbytes_keeps_what_its_row_says() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.ParameterList(torch.ones(size) for size in (1, 4095, 4096, 4097, 4352, 70_001))
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    _step(model, optimizer)
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    measured = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
    predicted = plan(model, rules=["adam"], storages=["bf16"]).entries
    assert {entry.storage: entry.memory.states for entry in predicted}["bitsandbytes AdamW8bit"] == measured


def test_torchao_stores_ragged_tensors_plainly() -> None:
    eight, four = (PEERS[f"torchao AdamW{bits}bit"].state for bits in (8, 4))
    assert [eight.stored([n]) for n in (4095, 4096, 4097)] == [8190, 4096 + 16 * 4 + 1024, 8194]
    assert [four.stored([n]) for n in (4095, 4096, 4224)] == [8190, 2048 + 32 * 4 + 64, 2112 + 33 * 4 + 64]
    flash = PEERS["FlashOptim AdamW 24-bit"].state
    assert [flash.stored([n]) for n in (1, 32, 33)] == [3, 34, 37]


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ({}, {}, ValueError, "the model has no parameters"),
        ({"a": (0, 5)}, {}, ValueError, "the model has no parameters"),
        (torch.ones(3), {}, TypeError, "must be an nn.Module or shapes by name, got Tensor"),
        ({"a": (3, -1)}, {}, ValueError, "the shape of 'a' must be a sequence of integers"),
        ({"a": 3.0}, {}, ValueError, "the shape of 'a' must be a sequence of integers"),
        (nn.LazyLinear(3), {}, ValueError, "weight has no shape yet"),
        ({"a": (3,)}, {"grad_dtype": "int8"}, ValueError, "grad_dtype='int8' is unknown"),
        ({"a": (3,)}, {"gpus": 2.0}, TypeError, "gpus must be an integer, got 2.0"),
        ({"a": (3,)}, {"shard": "zero3"}, ValueError, "allowed: none, states, all"),
        ({"a": (3,)}, {"keep_fp32": 1.5}, TypeError, "keep_fp32 must be a number of elements"),
        ({"a": (3,)}, {"storages": ["split8+int9"]}, ValueError, "stored as 'int9'"),
        ({"a": (3,)}, {"rules": []}, ValueError, "at least one rule and one storage"),
        ({"a": (3,)}, {"storages": []}, ValueError, "at least one rule and one storage"),
    ],
)
def test_wrong_arguments(model: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(model, **options)


def test_wrong_codec_of_one_state() -> None:
    with pytest.raises(ValueError, match="states cannot be stored as 'int9'"):
        Storage("x", state_codec={"exp_avg": "int9"})
    with pytest.raises(ValueError, match=r"state_codec names \['mean'\], but the states of lion"):
        plan({"a": (3,)}, rules=["lion"], storages=[Storage("x", state_codec={"mean": "int8"})])
