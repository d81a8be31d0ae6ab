"""Steps and functions do not depend on torch's default dtype and device, nor on autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim.kernels.spectral import blas
from fused_optim.sparsity import CAST, SRSTE
from fused_optim.spectral import (
    Hypersphere,
    SpectralClip,
    hard_clip,
    inverse_sqrt,
    orthogonalize,
    soft_clip,
    spectral_norm,
)
from tests.cases import normal

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS: dict[str, Callable[[list[Parameter]], Any]] = {
    "adamw": lambda params: fused_optim.AdamW(params, lr=0.1),
    "lion_8bit": lambda params: fused_optim.Lion8bit(params, lr=0.1, keep_fp32=0, clip_grad_norm=1.0),
    "companded": lambda params: fused_optim.AdamW(params, lr=0.1, state_codec="int8_companded", keep_fp32=0),
    "int4": lambda params: fused_optim.AdamW4bit(params, lr=0.1, keep_fp32=0, skip_nonfinite=True),
    "muon": lambda params: fused_optim.Muon(params, lr=0.1),
    "muon_of_groups": lambda params: fused_optim.Muon(
        [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
    ),
    "normuon": lambda params: fused_optim.NorMuon(params, lr=0.1),
    "muonh": lambda params: fused_optim.MuonH(params, lr=0.1, weight_decay=0.1),
    "adamh": lambda params: fused_optim.AdamH(params, lr=0.1),
    "clipped": lambda params: fused_optim.AdamW(params, lr=0.1, spectral=SpectralClip(post=0.3, pre=0.3)),
    "sphere": lambda params: fused_optim.SGD(params, lr=0.1, momentum=0.9, spectral=Hypersphere()),
    "sr_ste": lambda params: fused_optim.AdamW(params, lr=0.1, sparsity=SRSTE()),
    "sr_ste_clipped": lambda params: fused_optim.AdamW(
        params, lr=0.1, sparsity=SRSTE(), spectral=SpectralClip(post=0.3)
    ),
    "cast": lambda params: fused_optim.CASTAdamS(params, lr=0.1, sparsity=CAST(total_steps=4)),
}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """torch's own defaults after a test."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def _trained(name: str, dtype: torch.dtype, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and states after three steps with another default dtype; torch's float32 draws the numbers."""
    shapes = ((16, 32), (16, 32), (3, 8, 16))
    torch.set_default_dtype(torch.float32)
    params = [Parameter(normal(shape, torch.float32, seed=i)) for i, shape in enumerate(shapes)]
    grads = [[normal(s, torch.float32, seed=10 * t + i) for i, s in enumerate(shapes)] for t in range(3)]
    torch.set_default_dtype(dtype)
    optimizer = OPTIMIZERS[name](params)
    for group in optimizer.param_groups:
        group["backend"] = backend
    for some in grads:
        for param, grad in zip(params, some, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    states = [value for p in params for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    return [p.detach().clone() for p in params], states


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_default_dtype(name: str, dtype: torch.dtype, backend: str) -> None:
    expected, found = (_trained(name, each, backend) for each in (torch.float32, dtype))
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_default_device(name: str) -> None:
    """Of tensors that are made on the way; "meta" ones have no values."""
    expected = _trained(name, torch.float32, "native")
    shapes = ((16, 32), (16, 32), (3, 8, 16))
    params = [Parameter(normal(shape, torch.float32, seed=i)) for i, shape in enumerate(shapes)]
    grads = [[normal(s, torch.float32, seed=10 * t + i) for i, s in enumerate(shapes)] for t in range(3)]
    optimizer = OPTIMIZERS[name](params)
    torch.set_default_device("meta")
    for some in grads:
        for param, grad in zip(params, some, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    for param, theirs in zip(params, expected[0], strict=True):
        assert torch.equal(param.detach(), theirs)


@pytest.mark.parametrize("rows", [40, 130, 400])
@pytest.mark.parametrize("library", ["torch's own", "this CPU's"])
def test_functions_on_a_default_device(rows: int, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "torch's own":
        monkeypatch.setattr(blas, "_onednn", lambda: None)
    X = normal((3, rows, rows + 20), torch.float32, seed=1)
    for c in (0.05, 1.0, 10.0):
        expected = soft_clip(X, c)
        torch.set_default_device("meta")
        found = soft_clip(X, c)
        torch.set_default_device(None)
        assert torch.equal(found, expected)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "orthogonalize": lambda X: orthogonalize(X, steps=8, dtype=torch.float32),
    "soft_clip": lambda X: soft_clip(X, 1.0),
    "hard_clip": lambda X: hard_clip(X, 1.0),
    "inverse_sqrt": lambda X: inverse_sqrt(X, ridge=1e-3),
    "spectral_norm": spectral_norm,
}


@pytest.mark.parametrize("rows", [40, 230])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_in_autocast(name: str, rows: int) -> None:
    X = normal((rows, rows + 20), torch.float32, seed=1)
    X = X @ X.mT if name == "inverse_sqrt" else X
    expected = FUNCTIONS[name](X)
    with torch.autocast("cpu", torch.bfloat16):
        assert (X @ X.mT).dtype is torch.bfloat16
        found = FUNCTIONS[name](X)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_in_autocast(name: str) -> None:
    expected = _trained(name, torch.float32, "native")
    with torch.autocast("cpu", torch.bfloat16):
        found = _trained(name, torch.float32, "native")
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(ours, theirs)
