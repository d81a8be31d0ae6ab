"""Masks where the host knows no step count, as with ``capturable`` on a GPU; run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fused_optim
from fused_optim import FusedOptimizer
from fused_optim.kernels.bucket import Bucket
from fused_optim.kernels.control import Control
from fused_optim.kernels.late_masks import MaskedBucket
from fused_optim.kernels.matrix import MatrixBucket
from fused_optim.sparsity import CAST, SRSTE, MaskDecay, MaskedDecay, OneShot, Sparsity, StructureDecay
from fused_optim.spectral import SpectralClip
from tests.cases import assert_same_bits, normal

STEPS = 8
RECIPES: dict[str, Sparsity] = {
    "one_shot": OneShot(at=3),
    "sr_ste": SRSTE(decay=0.01),
    "sr_ste_later": SRSTE(decay=0.01, dense_steps=3),
    "sr_ste_seldom": SRSTE(decay=0.01, dense_steps=1, every=3),
    "mask_decay": MaskDecay(dense_steps=2, decay_steps=4),
    "exponential": MaskDecay(decay_steps=6, kind="exponential"),
    "structure_decay": StructureDecay(n=1, m=8, total_steps=STEPS),
    "masked_decay": MaskedDecay(total_steps=STEPS, every=2, decay=0.01),
    "late": SRSTE(m=3),
    "late_one_shot": OneShot(at=3, n=1, m=3),
}


def _params() -> list[Parameter]:
    return [Parameter(normal((8, 24), torch.float32, seed)) for seed in (1, 2)]


def _on_device(optimizer: FusedOptimizer) -> Bucket:
    """The optimizer's only bucket, with rows that are made by tensor operations."""
    (planned,) = optimizer._make_plan(False).buckets
    key, members = planned.members[0].key, planned.members
    if key.cut is not None:
        return MatrixBucket(key, members, True, torch.zeros(2 * 8 * 24))
    return (Bucket if key.finder is None else MaskedBucket)(key, members, False, True)


def _set_gradients(params: list[Parameter], step: int) -> None:
    for index, param in enumerate(params):
        param.grad = normal(param.shape, param.dtype, 10 * step + index)


def _step(bucket: Bucket, optimizer: FusedOptimizer, active: Any = None) -> None:
    assert bucket.collect()
    bucket.prepare(optimizer.param_groups, Control([1.0], active))
    bucket.commit()
    bucket.run()


def _train(make: Any, **options: Any) -> tuple[list[Parameter], list[Parameter]]:
    """The same steps with rows made on the host and on the device."""
    host, device = _params(), _params()
    ours, theirs = make(host, lr=0.01, **options), make(device, lr=0.01, **options)
    bucket = None
    for step in range(STEPS):
        _set_gradients(host, step)
        _set_gradients(device, step)
        ours.step()
        bucket = _on_device(theirs) if bucket is None else bucket
        _step(bucket, theirs)
    return host, device


@pytest.mark.parametrize("spectral", [None, SpectralClip(post=0.5)], ids=["plain", "clipped"])
@pytest.mark.parametrize("name", RECIPES)
def test_step_counts_that_the_host_never_reads(name: str, spectral: Any) -> None:
    trained = _train(fused_optim.AdamW, weight_decay=0.1, sparsity=RECIPES[name], spectral=spectral)
    for p, q in zip(*trained, strict=True):
        assert_same_bits((q == 0).float(), (p == 0).float(), "which weights are zero")
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


def test_cast() -> None:
    trained = _train(fused_optim.CASTAdamS, l1=0.3, sparsity=CAST(total_steps=STEPS, every=3))
    for p, q in zip(*trained, strict=True):
        assert int((q == 0).sum()) == q.numel() // 2
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("spectral", [None, SpectralClip(post=0.5)], ids=["plain", "clipped"])
@pytest.mark.parametrize("name", ["sr_ste", "late", "masked_decay"])
def test_a_step_that_the_device_skips_leaves_masks_alone(name: str, spectral: Any, active: bool) -> None:
    params = _params()
    optimizer = fused_optim.AdamW(params, lr=0.3, sparsity=RECIPES[name], spectral=spectral)
    _set_gradients(params, 0)
    bucket = _on_device(optimizer)
    _step(bucket, optimizer)
    before = [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]
    _set_gradients(params, 1)
    _step(bucket, optimizer, torch.tensor(active))
    after = [x.detach() for p in params for x in (p, *optimizer.state[p].values())]
    assert all(torch.equal(x, y) != active for x, y in zip(before, after, strict=True))
