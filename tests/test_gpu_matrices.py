"""Steps that are cut by whole matrices, on a GPU: graphs, and a host that never waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fused_optim
from fused_optim import FusedOptimizer
from fused_optim.spectral import ClipSchedule, Hypersphere, SpectralClip
from tests.cases import assert_same_bits, normal

pytestmark = pytest.mark.gpu

SHAPES = ((96, 64), (64, 96), (96, 64), (4, 32, 48), (33,))
SCHEDULE = ClipSchedule(warmup_steps=2, peak_lr=0.1, total_steps=9, decay="cosine", decay_fraction=0.5)
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (fused_optim.AdamW, {"spectral": SpectralClip(0.5, 0.7, SCHEDULE)}),
    "coupled": (fused_optim.Adam, {"spectral": SpectralClip(0.5), "weight_decay": 0.1}),
    "sphere": (fused_optim.Lion, {"spectral": Hypersphere()}),
    "muon": (fused_optim.Muon, {"others": "adamw"}),
    "muon-int8": (fused_optim.Muon, {"others": "lion", "state_codec": "int8", "keep_fp32": ()}),
    "normuon": (fused_optim.NorMuon, {"others": "adamw", "radius": "fixed"}),
}


def _params() -> list[Parameter]:
    return [Parameter(normal(shape, torch.float32, i).cuda()) for i, shape in enumerate(SHAPES)]


def _set(params: list[Parameter], step: int) -> None:
    for index, param in enumerate(params):
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(normal(tuple(param.shape), torch.float32, 100 * step + index))


def _build(name: str, params: list[Parameter], **options: Any) -> FusedOptimizer:
    optimizer_class, own = OPTIMIZERS[name]
    return optimizer_class(params, lr=0.05, **own, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replayed_graphs_equal_steps(name: str) -> None:
    captured, eager = _params(), _params()
    ours, theirs = _build(name, captured, capturable=True), _build(name, eager, capturable=True)
    graph = torch.cuda.CUDAGraph()
    for step in range(6):
        _set(captured, step)
        _set(eager, step)
        theirs.step()
        if step < 2:
            ours.step()
        elif step == 2:
            before = [p.detach().clone() for p in captured]
            with torch.cuda.graph(graph):
                ours.step()
            for p, old in zip(captured, before, strict=True):
                assert_same_bits(p.detach(), old)
            graph.replay()
        else:
            graph.replay()
        for p, q in zip(captured, eager, strict=True):
            assert_same_bits(p.detach(), q.detach())
            for key, value in theirs.state[q].items():
                assert_same_bits(ours.state[p][key], value, key)


@pytest.mark.parametrize(
    "options", [{}, {"clip_grad_norm": 0.5, "skip_nonfinite": True}], ids=["plain", "clip"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_host_never_waits(name: str, options: dict[str, Any]) -> None:
    params = _params()
    optimizer = _build(name, params, **options)
    for step in range(2):
        _set(params, step)
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
