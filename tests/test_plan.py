"""The plan's device side, run on a CPU: step counts that the host never reads give the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim.kernels.bucket import Bucket, Member
from fused_optim.kernels.control import Control, control
from fused_optim.optimizer import FusedOptimizer

CLASSES = {
    "adamw": (fused_optim.AdamW, {"weight_decay": 0.1}),
    "adam-amsgrad": (fused_optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    "lion": (fused_optim.Lion, {"weight_decay": 0.1}),
    "lion-random": (fused_optim.Lion, {"state_codec": "bf16_sr", "seed": 0xF0000001}),
    "adamw-blocks": (fused_optim.AdamW, {"state_codec": "int8", "keep_fp32": 0}),
    "sgd": (fused_optim.SGD, {"lr": 0.1}),
    "sgd-dampening": (fused_optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "sgd-nesterov": (fused_optim.SGD, {"momentum": 0.9, "nesterov": True}),
}
CPU = torch.device("cpu")
INF = float("inf")


def _optimizer(name: str) -> tuple[FusedOptimizer, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(7)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (3, 40, 257)]
    cls, options = CLASSES[name]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}]
    return cls(groups, backend="reference", **options), params


def _gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(size, generator=generator) for size in (3, 40, 257)]


def _device_bucket(optimizer: FusedOptimizer) -> Bucket:
    """The optimizer's only bucket, as it would be planned on a GPU."""
    plan = optimizer._make_plan(on_device=True)
    (bucket,) = plan.buckets
    members: list[Member] = bucket.members
    key = optimizer._checked_key(0, 0, members[0].param)
    return Bucket(key, members, strided=False, steps_on_device=True)


@pytest.mark.parametrize("name", CLASSES)
def test_rows_prepared_on_the_device_give_the_host_rows_bits(name: str) -> None:
    host, host_params = _optimizer(name)
    device, device_params = _optimizer(name)
    bucket: Bucket | None = None
    for step in range(12):
        for param, other, gradient in zip(host_params, device_params, _gradients(step), strict=True):
            param.grad, other.grad = gradient * 0.5, gradient.clone()
        host.step()
        bucket = bucket or _device_bucket(device)
        assert bucket.collect()
        half = torch.tensor(0.5, dtype=torch.float64)
        # Every third step is tried twice; the first time a non-finite gradient makes it inactive.
        for active in (False, True) if step % 3 == 0 else (True,):
            bucket.prepare(device.param_groups, Control([half, half], torch.tensor(active)))
            bucket.commit()
            bucket.driver.step(bucket)
    for param, other in zip(host_params, device_params, strict=True):
        assert torch.equal(param, other)
        for key, value in host.state[param].items():
            assert torch.equal(value, device.state[other][key]), key


def test_an_inactive_row_leaves_every_bit(name: str = "adam-amsgrad") -> None:
    optimizer, params = _optimizer(name)
    for param, gradient in zip(params, _gradients(0), strict=True):
        param.grad = gradient
    bucket = _device_bucket(optimizer)
    params[0].grad.fill_(float("nan"))  # pyright: ignore[reportOptionalMemberAccess]
    before = [p.detach().clone() for p in params]
    assert bucket.collect()
    bucket.prepare(optimizer.param_groups, Control([1.0, 1.0], torch.tensor(False)))
    bucket.commit()
    bucket.driver.step(bucket)
    assert all(map(torch.equal, params, before))
    assert all(not value.any() for p in params for value in optimizer.state[p].values())


@pytest.mark.parametrize("clip", [None, 0.5, 100.0], ids=["no-clip", "clips", "below-clip"])
@pytest.mark.parametrize("scale", [None, 8.0], ids=["no-scaler", "scaler"])
@pytest.mark.parametrize("square_sum", [9.0, INF, float("nan"), -INF])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_control_is_the_same_on_host_and_device(
    clip: float | None, scale: float | None, square_sum: float, found_inf: float | None
) -> None:
    tensors = [
        None if x is None else torch.tensor(x, dtype=torch.float64) for x in (scale, found_inf, square_sum)
    ]
    host = control(CPU, *tensors, [clip, None], True)
    # The meta device stands for "not a CPU" in choosing the path; the arithmetic runs on CPU tensors.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_optim.kernels.control._here", lambda value, device: value)
        device = control(torch.device("meta"), *tensors, [clip, None], True)
    assert bool(device.active) == host.active == (found_inf in (None, 0.0) and square_sum < INF)
    for a, b in zip(host.g_scales, device.g_scales, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b).double(), equal_nan=True
        )
    if square_sum < INF:
        # Of finite gradients whose sum float64 cannot hold it is -inf.
        norm = abs(square_sum) ** 0.5 / (scale or 1.0)
        expected = (1.0 if clip is None else min(1.0, clip / (norm + 1e-6))) / (scale or 1.0)
        assert host.g_scales == pytest.approx([expected, 1.0 / (scale or 1.0)], rel=1e-12)


def test_one_of_several_codecs_changes_in_place() -> None:
    param = Parameter(torch.ones(8))
    optimizer = fused_optim.AdamW([param], state_codec={"exp_avg": "fp32"})
    param.grad = torch.ones(8)
    optimizer.step()
    optimizer.param_groups[0]["state_codec"]["exp_avg"] = "bf16"
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.step()


def test_random_bits_after_very_many_steps() -> None:
    param = Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = fused_optim.AdamW([param], param_codec="bf16_sr")
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["step"] = torch.tensor(2.0**32)
    optimizer.step()
    assert param.isfinite().all()
