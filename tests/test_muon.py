"""Muon and its relatives: against the papers in float64, against torch.optim.Muon, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR

import fused_optim
from fused_optim.kernels.spectral.coefficients import schedule
from fused_optim.spectral import Hypersphere
from tests.cases import assert_same_bits, normal
from tests.oracles.adamw import adamw
from tests.oracles.lion import lion
from tests.oracles.matrices import on_sphere
from tests.oracles.muon import muon
from tests.oracles.spectral import newton_schulz

SHAPES = ((12, 8), (8, 12), (8, 8), (8, 8), (1, 5), (6, 1))
STEPS = 4
TORCH_HAS_MUON = hasattr(torch.optim, "Muon")
try:
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
except ImportError as error:
    # torch's own list needs expecttest, which a machine for GPU tests alone may lack.
    WITHOUT, OptimizerErrorEnum, optim_db = f"torch's list cannot be imported ({error})", None, []
else:
    WITHOUT = ""
INFOS = [info for info in optim_db if info.optim_cls.__name__ == "Muon"]
INPUTS = [item for info in INFOS for item in info.optim_inputs_func(device="cpu")]
ERROR_INPUTS = [
    item for info in INFOS for item in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]
needs_torchs_muon = pytest.mark.skipif(not TORCH_HAS_MUON, reason="torch has Muon from 2.9 on")
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_nesterov": {"nesterov": False, "momentum": 0.8},
    "rms": {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3},
    "unclamped": {"adjust_lr_fn": "spectral_unclamped", "maximize": True},
    "normuon": {"beta2": 0.9, "lr": 0.05},
    "fixed_radius": {"radius": "fixed", "lr": 0.1},
    "fixed_radius_and_decay": {"radius": "fixed", "lr": 0.1, "weight_decay": 2.0},
    "current_radius": {"radius": "current", "lr": 0.1},
    "normuon_on_a_sphere": {"radius": "fixed", "beta2": 0.95, "lr": 0.1, "weight_decay": 0.0},
}


def _params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(normal(shape, dtype, seed=i)) for i, shape in enumerate(SHAPES)]


def _set_gradients(params: list[Parameter], step: int, scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        p.grad = normal(p.shape, torch.float32, seed=1000 * step + i).to(p.dtype) * scale


@pytest.mark.parametrize(
    "coefficients", ["jordan", "polar_express", ((3.0, -4.0, 2.0), (1.5, -0.5, 0.0))], ids=str
)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_papers(name: str, coefficients: Any) -> None:
    options = {"lr": 0.02, **OPTIONS[name]}
    params, starts = _params(), [p.detach().double().numpy() for p in _params()]
    optimizer = fused_optim.Muon(
        params, **options, ns_coefficients=coefficients, ns_steps=6, ns_dtype=torch.float32
    )
    grads: list[list[np.ndarray]] = [[] for _ in params]
    for step in range(STEPS):
        _set_gradients(params, step)
        for kept, p in zip(grads, params, strict=True):
            assert p.grad is not None
            kept.append(p.grad.double().numpy().copy())
        optimizer.step()
    plan = schedule(coefficients, 6)
    polynomials = partial(newton_schulz, steps=plan.steps, margin=plan.margin)
    for p, start, given in zip(params, starts, grads, strict=True):
        expected = muon(start, given, orthogonal=polynomials, **options)
        state = optimizer.state[p]
        assert set(state) == {"step", *expected} - {"param"}
        for key, value in expected.items():
            actual = p.detach() if key == "param" else state[key]
            np.testing.assert_allclose(actual.numpy(), value, rtol=2e-4, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("item", INPUTS, ids=lambda item: item.desc)
def test_torch_inputs(item: Any) -> None:
    """Muon's own inputs; within what bfloat16 leaves of the update."""
    ours, theirs = _params(), _params()
    kwargs = copy.deepcopy(item.kwargs)
    a, b = fused_optim.Muon(ours, **kwargs), torch.optim.Muon(theirs, **copy.deepcopy(kwargs))
    for step in range(STEPS):
        _set_gradients(ours, step)
        _set_gradients(theirs, step)
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, _params(), strict=True):
        moved = (q - start).norm()
        assert moved > 0
        assert (p - q).norm() < 0.05 * moved
        buffer = b.state[q]["momentum_buffer"]
        torch.testing.assert_close(a.state[p]["momentum_buffer"], buffer, rtol=1e-5, atol=1e-6)


@needs_torchs_muon
@pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT)
def test_torch_lists_inputs() -> None:
    assert len(INPUTS) >= 4 and len(ERROR_INPUTS) >= 1


@pytest.mark.parametrize("item", ERROR_INPUTS, ids=lambda item: item.optimizer_error_input.desc)
def test_torch_error_inputs(item: Any) -> None:
    params, kwargs = item.optimizer_error_input.params, item.optimizer_error_input.kwargs
    if issubclass(item.error_type, Warning):
        with pytest.warns(item.error_type, match=item.error_regex):
            fused_optim.Muon(params, **kwargs)
        return
    if item.optimizer_error_input.desc == "only support 2D parameters":
        # Stacks of matrices and convolutions are welcome here; test_what_is_refused has vectors.
        assert all(3 <= p.ndim <= 5 for p in params)
        fused_optim.Muon(params, **kwargs)
        return
    # What torch notices in the first step is refused here before.
    assert item.error_on in (OptimizerErrorEnum.CONSTRUCTION_ERROR, OptimizerErrorEnum.STEP_ERROR)
    given = [Parameter(torch.ones(2, 2))] if params is None else params
    with pytest.raises(item.error_type, match=item.error_regex):
        fused_optim.Muon(given, **kwargs)


@needs_torchs_muon
def test_arguments_have_torch_names_order_and_defaults() -> None:
    ours, theirs = (cls([Parameter(torch.ones(1, 1))]) for cls in (fused_optim.Muon, torch.optim.Muon))
    assert {key: value for key, value in ours.defaults.items() if key in theirs.defaults} == theirs.defaults
    expected = torch.optim.Muon.__init__.__code__
    names = fused_optim.Muon.__init__.__code__.co_varnames
    assert names[: expected.co_argcount] == expected.co_varnames[: expected.co_argcount]


@needs_torchs_muon
@pytest.mark.parametrize("cls", [fused_optim.Muon, fused_optim.NorMuon, fused_optim.MuonH])
def test_schedulers_cycle_the_momentum(cls: Any) -> None:
    """As torch.optim.Muon's; the betas of the others stay."""
    bare = [Parameter(torch.ones(4, 4))], [Parameter(torch.ones(4, 4))]
    mixed = [("up.weight", Parameter(torch.ones(4, 4))), ("bias", Parameter(torch.ones(4)))]
    theirs = torch.optim.Muon(bare[0])
    alone, whole = cls(bare[1]), cls(mixed, others="lion", others_betas=(0.7, 0.8))
    optimizers = (theirs, alone, whole)
    schedulers = [OneCycleLR(each, max_lr=0.1, total_steps=8) for each in optimizers]
    seen = []
    for _ in range(7):
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        momenta = [optimizer.param_groups[0]["momentum"] for optimizer in optimizers]
        assert momenta[0] == momenta[1] == momenta[2]
        seen.append(momenta[0])
        assert "betas" not in alone.param_groups[0]
        assert whole.param_groups[1]["betas"] == (0.7, 0.8)
    assert len(set(seen)) > 3
    chosen = cls([{"params": bare[1], "algorithm": "adamw"}])
    assert chosen.param_groups[0]["betas"] == (0.9, 0.95)


@needs_torchs_muon
def test_checkpoints_go_to_torch_and_back() -> None:
    ours, theirs = _params(), _params()
    a, b = fused_optim.Muon(ours, lr=0.05), torch.optim.Muon(theirs)
    for step in range(2):
        _set_gradients(ours, step)
        a.step()
    b.load_state_dict(a.state_dict(portable=True))
    assert b.param_groups[0]["lr"] == 0.05
    c = fused_optim.Muon(_params())
    c.load_state_dict(b.state_dict())
    for p, q in zip(ours, c.param_groups[0]["params"], strict=True):
        assert_same_bits(c.state[q]["momentum_buffer"], a.state[p]["momentum_buffer"])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12], ids=str)
def test_the_size_of_gradients_does_not_matter(magnitude: float) -> None:
    plain, scaled = _params(), _params()
    for params, scale in ((plain, 1.0), (scaled, magnitude)):
        optimizer = fused_optim.Muon(params, lr=0.1)
        _set_gradients(params, 0, scale)
        optimizer.step()
    for p, q, start in zip(plain, scaled, _params(), strict=True):
        assert (p - q).norm() < 0.02 * (p - start).norm()


def test_a_zero_gradient_moves_nothing_but_by_decay() -> None:
    params = [Parameter(torch.ones(4, 4))]
    optimizer = fused_optim.Muon(params, lr=0.1, weight_decay=0.5)
    params[0].grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(params[0], torch.full((4, 4), 0.95))


@pytest.mark.parametrize("state_codec", ["bf16", "int8", "int8_companded", "fp8", "int4"])
@pytest.mark.parametrize("param", ["fp32", "bf16_split8", "bf16_sr"])
def test_momentum_in_few_bits(state_codec: str, param: str) -> None:
    """The update of a few steps stays close to that of fp32 momentum."""
    dtype = torch.float32 if param == "fp32" else torch.bfloat16
    plain, narrow = ([Parameter(normal((32, 64), dtype, seed=1))] for _ in range(2))
    exact = "fp32" if param == "fp32" else "bf16_split16"
    ours = fused_optim.Muon(plain, lr=0.05, param_codec=exact, ns_coefficients="polar_express")
    theirs = fused_optim.Muon(
        narrow,
        lr=0.05,
        param_codec=param,
        state_codec=state_codec,
        keep_fp32=(),
        ns_coefficients="polar_express",
    )
    for step in range(STEPS):
        _set_gradients(plain, step)
        _set_gradients(narrow, step)
        ours.step()
        theirs.step()
    start = normal((32, 64), dtype, seed=1)
    p, q = (x[0].detach().float() for x in (plain, narrow))
    moved = (p - start.float()).norm()
    # Weights of size ten in steps of a tenth: rounding them stochastically is noise as large as four bits.
    rough = state_codec in ("int4", "fp8") or param == "bf16_sr"
    assert (p - q).norm() < (0.4 if rough else 0.15) * moved


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 32)
        self.experts = Parameter(normal((3, 8, 16), torch.float32, seed=1))
        self.conv = nn.Conv2d(4, 8, 3)
        self.lm_head = nn.Linear(32, 20)


@pytest.mark.parametrize("others", ["adamw", "lion"])
def test_one_optimizer_for_a_whole_model(others: Any) -> None:
    model = _Model()
    start = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    optimizer = fused_optim.Muon(model.named_parameters(), lr=0.02, others=others, others_lr=0.01)
    hidden, rest = optimizer.param_groups
    assert hidden["param_names"] == ["experts", "up.weight", "conv.weight"]
    assert rest["algorithm"] == others and rest["lr"] == 0.01 and hidden["lr"] == 0.02
    for p in model.parameters():
        p.grad = normal(p.shape, torch.float32, seed=p.numel())
    optimizer.step()
    oracle = {"adamw": adamw, "lion": lion}[others]
    betas = {"adamw": (0.9, 0.95), "lion": (0.9, 0.98)}[others]
    for name, p in model.named_parameters():
        assert p.grad is not None
        if name in rest["param_names"]:
            expected = oracle(start[name], [p.grad.double().numpy()], lr=0.01, betas=betas, weight_decay=0.1)
            np.testing.assert_allclose(p.detach().numpy(), expected["param"], rtol=1e-5, atol=1e-6)
        else:
            matrices = p.detach().flatten(1) if p.ndim == 4 else p.detach()
            before = torch.from_numpy(start[name]).reshape(matrices.shape)
            m, n = matrices.shape[-2:]
            update = (before * (1 - 0.02 * 0.1) - matrices) / 0.02 / max(1, m / n) ** 0.5
            values = torch.linalg.svdvals(update)
            assert values.min() > 0.4 and values.max() < 1.3


def test_groups_of_ones_own() -> None:
    model = _Model()
    named = list(model.named_parameters())
    optimizer = fused_optim.Muon(
        [
            {"params": named[:3], "lr": 0.5},
            {"params": named[3:], "algorithm": "lion", "betas": (0.5, 0.6)},
        ],
        others="adamw",
    )
    kinds = [(group["algorithm"], group["lr"]) for group in optimizer.param_groups]
    assert kinds == [("muon", 0.5), ("adamw", 3e-4), ("lion", 1e-3)]
    only = fused_optim.Muon(named, hidden=lambda name, p: name == "up.weight", others="lion")
    assert only.param_groups[0]["param_names"] == ["up.weight"]
    before = len(only.param_groups)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        only.add_param_group({"params": [("new", Parameter(torch.ones(2))), named[0]]})
    assert len(only.param_groups) == before


def test_copies_and_pickles_go_on_alike() -> None:
    params = _params()
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = fused_optim.NorMuon(named, others="lion", state_codec="int8", keep_fp32=())
    _set_gradients(params, 0)
    optimizer.step()
    again = pickle.loads(pickle.dumps((optimizer, params)))
    copied = copy.deepcopy((optimizer, params))
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    fresh = [Parameter(p.detach().clone()) for p in params]
    loaded = fused_optim.NorMuon(
        [(f"p{i}", p) for i, p in enumerate(fresh)], others="lion", state_codec="int8", keep_fp32=()
    )
    loaded.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    for other, its in (again, copied, (loaded, fresh)):
        _set_gradients(its, 1)
        other.step()
        other.add_param_group({"params": [("late", Parameter(torch.ones(3)))]})
        assert other.param_groups[-1]["algorithm"] == "lion"
    _set_gradients(params, 1)
    optimizer.step()
    for i, p in enumerate(params):
        for _, its in (again, copied, (loaded, fresh)):
            assert_same_bits(its[i].detach(), p.detach())


def test_adamh_equals_the_paper() -> None:
    start = normal((6, 4), torch.float32, seed=1)
    param, bias = Parameter(start.clone()), Parameter(torch.ones(3))
    optimizer = fused_optim.AdamH([param, bias], lr=0.1, weight_decay=0.0, betas=(0.0, 0.9))
    theta, second = start.double().numpy(), np.zeros((6, 4))
    radius = np.linalg.norm(theta)
    for step in range(1, 5):
        param.grad, bias.grad = normal((6, 4), torch.float32, seed=step), torch.ones(3)
        g = param.grad.double().numpy()
        second = 0.9 * second + 0.1 * g**2
        theta = on_sphere(theta, g / (np.sqrt(second / (1 - 0.9**step)) + 1e-8), 0.1, 0.0, radius)
        optimizer.step()
    np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-5, atol=1e-6)
    assert bias[0] < 1


@pytest.mark.parametrize("radius", ["fixed", "current"])
def test_zero_matrices_leave_for_the_sphere(radius: str) -> None:
    param = Parameter(torch.zeros(9, 4))
    optimizer = fused_optim.AdamW([param], lr=0.1, weight_decay=0.0, spectral=Hypersphere(radius))
    for _ in range(3):
        param.grad = normal((9, 4), torch.float32, seed=3)
        optimizer.step()
        assert param.norm().item() == pytest.approx(3.0, rel=1e-5)


def _make(*shape: int, dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    return [("blocks.weight", torch.zeros(shape, dtype=dtype))]


WRONG: dict[str, tuple[list[tuple[str, Tensor]], dict[str, Any], str]] = {
    "vector": (_make(4), {}, "2D parameters.*others='adamw'"),
    "six_dimensions": (_make(1, 1, 1, 1, 1, 1), {}, "2D parameters"),
    "fp64": (_make(4, 4, dtype=torch.float64), {}, "float64.*convert it"),
    "others": (_make(4, 4), {"others": "sgd"}, "others='sgd' is unknown; allowed: 'adamw', 'lion'"),
    "spectral": (_make(4, 4), {"spectral": Hypersphere()}, "it is for others"),
    "steps": (_make(4, 4), {"ns_steps": 100}, "less than 100"),
    "no_steps": (_make(4, 4), {"ns_steps": 0}, "at least 1"),
    "coefficients": (_make(4, 4), {"ns_coefficients": ((1.0, 2.0),)}, "three numbers"),
    "triples": (_make(4, 4), {"ns_coefficients": [(1.5, -0.5, 0.0)] * 7}, "7 triples for 5 steps"),
    "schedule": (_make(4, 4), {"ns_coefficients": "newton"}, "'jordan'"),
    "beta2": (_make(4, 4), {"beta2": 1.0}, "Invalid beta2"),
    "radius": (_make(4, 4), {"radius": "big"}, "'fixed', 'current'"),
    "dtype": (_make(4, 4), {"ns_dtype": torch.float64}, "torch.bfloat16"),
    "split": (_make(4, 4), {"split": {"blocks.*": 3}}, "does not fit parameter 0 of group 0"),
    "split_on_a_sphere": (_make(4, 4), {"split": {"blocks.*": 2}, "radius": "fixed"}, "do not go together"),
    "algorithm": (_make(4, 4), {"momentum": -1.0}, "momentum"),
    "not_a_number": (_make(4, 4), {"ns_coefficients": (1.5, float("nan"), 0.0)}, "finite numbers"),
    "no_name": ([("", torch.zeros(4, 4))], {"others": "adamw"}, "(4, 4).*without a name.*named_parameters"),
}
WRONG_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "beta2": ({"beta2": "a"}, "beta2 must be a number in"),
    "coefficients": ({"ns_coefficients": 5}, "ns_coefficients must be a name, .* got 5"),
    "hidden": ({"others": "adamw", "hidden": 3}, "hidden must be a function .* got 3"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_types_that_are_refused(name: str) -> None:
    options, message = WRONG_TYPES[name]
    with pytest.raises(TypeError, match=message):
        fused_optim.Muon(_make(4, 4), **options)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    params, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        fused_optim.Muon(params, **options)
