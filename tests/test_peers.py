"""Adapters of optional packages: stand-ins have the packages' signatures, and their steps must be right."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import ceiling, comparison, iterations, muons, newton_schulz, verify
from bench.comparison import Absent
from bench.comparison import Contender as Timed
from bench.iterations import ITERATIONS
from bench.muons import JORDAN, MUONS
from bench.peers import PEERS, Contender, MissingPeerError, Peer
from bench.run import Gradients, Run

CPU = torch.device("cpu")
SIZES: list[tuple[int, ...]] = [(64,), (8, 33)]
SMALL = Namespace(width=64, layers=1)


def _deepspeed_adam(
    model_params: Any,
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    amsgrad: bool = False,
    adamw_mode: bool = True,
    fp32_optimizer_states: bool = True,
) -> torch.optim.Optimizer:
    assert bias_correction and adamw_mode and fp32_optimizer_states and not amsgrad
    return torch.optim.AdamW(model_params, lr, betas, eps, weight_decay)


def _deepspeed_lion(
    model_params: Any,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0,
    fp32_optimizer_states: bool = True,
) -> torch.optim.Optimizer:
    from lion_pytorch import Lion

    return Lion(model_params, lr, betas, weight_decay)


class _Muon(torch.optim.Optimizer):
    """Steps that three packages agree on; what they were given is in ``defaults``."""

    coefficients: Sequence[Any]

    def __init__(self, params: Any, lr: float, scale: Callable[[float, Any], float], **given: Any) -> None:
        super().__init__(params, {"lr": lr, **given})
        self.scale = scale

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                X = param.grad if len(param) <= len(param.T) else param.grad.T
                X = X / X.norm()
                for a, b, c in self.coefficients:
                    A = X @ X.T
                    X = a * X + (b * A + c * A @ A) @ X
                update = X if len(param) <= len(param.T) else X.T
                param.add_(update, alpha=-self.scale(group["lr"], param.shape))


def _larger(lr: float, shape: Any) -> float:
    return lr * max(1.0, shape[0] / shape[1]) ** 0.5


def _muonium(
    params: Any,
    lr: float = 1e-3,
    wd: float = 0.3,
    use_cautious_wd: bool = True,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    orthogonalization_strategy: str = "polar_express",
    amsgrad: bool = False,
    adam_betas: tuple[float, float] = (0.9, 0.95),
    adam_eps: float = 1e-8,
    fused_adam: bool | None = None,
) -> torch.optim.Optimizer:
    params = list(params)
    if isinstance(params[0], dict):
        (group,) = params
        assert group["algorithm"] == "adamw" and not amsgrad
        return torch.optim.AdamW(group["params"], lr, adam_betas, adam_eps, wd, fused=fused_adam)
    made = _Muon(params, lr, _larger, wd=wd, momentum=momentum, nesterov=nesterov, cautious=use_cautious_wd)
    made.coefficients = [
        JORDAN if orthogonalization_strategy == "newton_schulz" else (2.0, -1.5, 0.5)
    ] * ns_steps
    return made


def _gram_muon(
    params: Any,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    adjust_lr: Callable[[float, Any], float] = lambda lr, shape: lr * 0.2 * max(shape) ** 0.5,
    ns_coefficients: Any = ((2.0, -1.5, 0.5),) * 5,
    ns_use_kernels: bool = True,
) -> torch.optim.Optimizer:
    print("Auto-tuning")
    if ns_use_kernels:
        raise ModuleNotFoundError("No module named 'quack'")
    made = _Muon(params, lr, adjust_lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
    made.coefficients = ns_coefficients
    return made


def _grouped_muon(
    params: Any,
    lr: float = 2e-2,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    ns_steps: int = 5,
) -> torch.optim.Optimizer:
    assert all(group["use_muon"] for group in params)
    made = _Muon(params, lr, _larger, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
    made.coefficients = [JORDAN] * ns_steps
    return made


def _fast_newtonschulz(G: Tensor, steps: int) -> Tensor:
    assert G.ndim == 2
    return muons.polynomials(G, steps).bfloat16()


def _gemm_symmetric(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    dynamic_scheduler: bool = False,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    assert A.shape == B.mT.shape and out is None and out_dtype is None
    return alpha * (A @ B) if C is None else torch.baddbmm(C, A, B, beta=beta, alpha=alpha)


def _gemm_add(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
    tuned: bool = True,
) -> Tensor:
    return torch.baddbmm(C, A, B, beta=beta, alpha=alpha)


MODULES: Mapping[str, Any] = {
    "deepspeed.ops": SimpleNamespace(
        adam=SimpleNamespace(DeepSpeedCPUAdam=_deepspeed_adam),
        lion=SimpleNamespace(DeepSpeedCPULion=_deepspeed_lion),
    ),
    "muonium": SimpleNamespace(Muon=_muonium),
    "gram_newton_schulz": SimpleNamespace(Muon=_gram_muon),
    "pytorch_optimizer": SimpleNamespace(Muon=_grouped_muon),
    "flash_muon": SimpleNamespace(fast_newtonschulz=_fast_newtonschulz),
    "quack.gemm_interface": SimpleNamespace(gemm_symmetric=_gemm_symmetric, gemm_add=_gemm_add),
}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins, in place of packages that may be installed as well."""
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)


def _run(source: str, rule: str) -> Run:
    return Run(Contender(source, rule), SIZES, Gradients(SIZES, CPU), CPU, False)


def _admit(name: str, peer: Peer) -> Timed | Absent:
    gradients = [torch.randn(shape) for shape in ((32, 32), (64, 32), (32, 64))]
    return muons.admit(name, peer, gradients, muons.first_changes(gradients))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("source", "rule"), [("deepspeed-cpu", "adam"), ("deepspeed-cpu", "lion"), ("muonium", "adam")]
)
def test_arguments_make_the_right_step(source: str, rule: str) -> None:
    run = _run(source, rule)
    assert run.check(verify.Sampler(SIZES, CPU)) <= run.contender.allowed_error


@pytest.mark.usefixtures("packages")
def test_arguments_of_other_names_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "muonium", replace(PEERS["muonium"], names={}))
    run = _run("muonium", "adam")
    assert run.check(verify.Sampler(SIZES, CPU)) > run.contender.allowed_error


def test_labels_name_the_class_and_its_algorithm() -> None:
    assert Contender("deepspeed-cpu", "lion").label == "deepspeed-cpu DeepSpeedCPULion fp32"
    assert Contender("muonium").label == "muonium Muon adamw fp32"


def test_other_devices_are_reported() -> None:
    # Before the package is looked for: it may be absent as well.
    with pytest.raises(MissingPeerError, match="deepspeed runs on cpu, not on meta"):
        Contender("deepspeed-cpu").make([torch.nn.Parameter(torch.ones(3, device="meta"))])
    for name in ("muonium", "gram-newton-schulz"):
        assert _admit(name, MUONS[name]) == Absent(name, "missing", f"{name} runs on cuda, not on cpu")


@pytest.mark.parametrize("failure", [RuntimeError("the op failed to build"), NotImplementedError("no GPU")])
def test_what_does_not_run_here_is_missing(monkeypatch: pytest.MonkeyPatch, failure: RuntimeError) -> None:
    def refuse(model_params: Any) -> None:
        raise failure from FileNotFoundError("g++\nand a long log")

    module = SimpleNamespace(adam=SimpleNamespace(DeepSpeedCPUAdam=refuse))
    monkeypatch.setitem(sys.modules, "deepspeed.ops", module)
    with pytest.raises(MissingPeerError, match=r"deepspeed does not run here \(g\+\+\)"):
        Contender("deepspeed-cpu").make([torch.nn.Parameter(torch.ones(3))])


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", MUONS)
def test_every_muon_takes_the_same_first_step(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "torch.optim.Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    found = _admit(name, replace(MUONS[name], device=""))
    if name == "gram-newton-schulz":
        reason = "gram-newton-schulz does not run here (No module named 'quack')"
        assert found == Absent(name, "missing", reason)
    else:
        assert isinstance(found, Timed), found
        assert found.error is not None and found.error() <= 0.03
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("gram-newton-schulz torch", "ns_coefficients"),
        ("gram-newton-schulz torch", "adjust_lr"),
        ("muonium", "orthogonalization_strategy"),
    ],
)
def test_a_muon_that_does_other_work_is_not_timed(name: str, without: str) -> None:
    options = {key: value for key, value in MUONS[name].options.items() if key != without}
    found = _admit(name, replace(MUONS[name], device="", options=options))
    assert isinstance(found, Absent) and found.status == "wrong" and "relative error" in found.reason


@pytest.mark.usefixtures("packages")
def test_muons_are_given_the_same_hyperparameters() -> None:
    params = [torch.nn.Parameter(torch.ones(4, 4))]
    names = {"weight_decay": "wd"}
    for name in ("pytorch-optimizer", "gram-newton-schulz torch", "muonium"):
        made = replace(MUONS[name], device="").make("muon", params, muons.HYPER).defaults
        renamed = {names.get(k, k) if name == "muonium" else k: v for k, v in muons.HYPER.items()}
        # Gradients are shared: muonium's look-ahead would change them.
        expected = {**renamed, "nesterov": False, "cautious": False} if name == "muonium" else renamed
        assert made == expected


BATCHES = [torch.randn(2, 32, 48), torch.randn(3, 48, 32)]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", ITERATIONS)
def test_iterations_of_other_kernels(name: str) -> None:
    """They are Jordan's five steps of every matrix; other work is not timed, other devices are reported."""
    peer = replace(ITERATIONS[name], device="cpu")
    found = iterations.admit(name, peer, BATCHES)
    assert isinstance(found, Timed) and found.error is not None and found.error() <= 0.03
    assert found.flops == ceiling.triangles(BATCHES)
    found.call()
    for X in BATCHES:
        for made, matrix in zip(peer.found(X)(X), X, strict=True):
            assert muons.distance(made, muons.polynomials(matrix, 5)) <= 0.03
    wrong = replace(peer, make=lambda *functions: lambda X: [-Y for Y in peer.make(*functions)(X)])
    refused = iterations.admit(name, wrong, BATCHES)
    assert isinstance(refused, Absent) and refused.status == "wrong"
    elsewhere = iterations.admit(name, ITERATIONS[name], BATCHES)
    assert elsewhere == Absent(name, "missing", f"{peer.package} runs on cuda, not on cpu")


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize("name", ITERATIONS)
def test_missing_iterations_have_reasons(name: str) -> None:
    peer = replace(ITERATIONS[name], device="cpu")
    found = iterations.admit(name, peer, BATCHES)
    assert isinstance(found, Absent) and found.status == "missing"
    assert found.reason.startswith(f"{peer.package} is not installed (")


@pytest.mark.usefixtures("no_packages")
def test_missing_muons_are_rows_with_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    arguments = ["--quick", "--suites", "step", "--device", "cpu", "--out", str(out)]
    assert newton_schulz.main(arguments) == 0
    (case,) = json.loads(out.read_text())["cases"]
    rows = {row["label"]: row for row in case["rows"]}
    assert set(rows) == set(MUONS)
    here = list(MUONS)[: 2 if hasattr(torch.optim, "Muon") else 1]
    assert [label for label, row in rows.items() if row["status"] == "ok"] == here
    assert rows["gram-newton-schulz torch"]["reason"].startswith("gram-newton-schulz is not installed (")
    printed = " ".join(capsys.readouterr().out.split())
    assert "missing: pytorch-optimizer is not installed" in printed
    assert "missing: muonium runs on cuda, not on cpu" in printed


@pytest.mark.usefixtures("no_packages")
def test_figures_against_a_missing_muon_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Peer("torch", "no_such_package", {"muon": "Muon"})
    monkeypatch.setattr(muons, "MUONS", {**MUONS, "torch.optim.Muon": broken})
    (case,) = muons.whole_step(SMALL, CPU)
    record = comparison.measure(case, CPU, 3, 1.0)
    assert record["targets"][0]["measured"] is None and record["targets"][0]["met"] is None


def test_our_own_muon_must_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gradients: Sequence[Tensor]) -> dict[int, Tensor]:
        return {0: torch.ones_like(gradients[0], dtype=torch.float64)}

    monkeypatch.setattr(muons, "first_changes", wrong)
    with pytest.raises(RuntimeError, match=r"fused_optim.Muon is wrong: relative error 1\.\d"):
        muons.whole_step(SMALL, CPU)
