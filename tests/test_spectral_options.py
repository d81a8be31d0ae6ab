"""Thresholds over a training, and what the options of whole matrices refuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_optim
from fused_optim.spectral import ClipSchedule, Hypersphere, SpectralClip

SCHEDULES = {
    "constant": [10.0, 10.0, 10.0],
    "linear": [10.0, 6.0, 2.0],
    "sqrt": [10.0, 2 + 8 * (1 - 0.5**0.5), 2.0],
    "cosine": [10.0, 6.0, 2.0],
    "square": [10.0, 2 + 8 * 0.75, 2.0],
    "exp": [10.0, 10 * 0.2**0.5, 2.0],
}


@pytest.mark.parametrize("decay", SCHEDULES)
def test_schedules(decay: str) -> None:
    schedule = ClipSchedule(4, 0.1, 100, decay, decay_fraction=0.2, final_scale=0.2)
    for kind in (float, partial(torch.tensor, dtype=torch.float64)):
        values = [float(schedule(10.0, kind(0.1), kind(float(step)))) for step in (81, 91, 101)]
        assert values == pytest.approx(SCHEDULES[decay])
        warm = [float(schedule(10.0, kind(lr), kind(float(step)))) for lr, step in ((0.01, 1), (0.05, 4))]
        assert warm == pytest.approx([100.0, 20.0])
        assert float(schedule(10.0, kind(0.05), kind(5.0))) == pytest.approx(10.0)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "post": (lambda: SpectralClip(post=0.0), ValueError, "post=0.0 must be positive"),
    "pre": (lambda: SpectralClip(pre=-1.0), ValueError, "pre=-1.0"),
    "inf": (lambda: SpectralClip(post=float("inf")), ValueError, "finite"),
    "nothing": (lambda: SpectralClip(post=None), ValueError, "clips nothing"),
    "text": (lambda: SpectralClip(post="10"), TypeError, "post must be a number"),  # pyright: ignore[reportArgumentType]
    "schedule": (lambda: SpectralClip(schedule=3), TypeError, "ClipSchedule"),  # pyright: ignore[reportArgumentType]
    "apply_to": (lambda: SpectralClip(apply_to=3), TypeError, "apply_to"),  # pyright: ignore[reportArgumentType]
    "split": (lambda: SpectralClip(split={"a": 0}), ValueError, "at least one row"),
    "workspace": (lambda: SpectralClip(workspace_bytes=0), ValueError, "workspace_bytes=0"),
    "decay": (lambda: ClipSchedule(decay="cubic"), ValueError, "allowed: constant, linear"),
    "total": (lambda: ClipSchedule(decay="linear"), ValueError, "total_steps"),
    "peak": (lambda: ClipSchedule(warmup_steps=3), ValueError, "peak_lr"),
    "warmup": (lambda: ClipSchedule(warmup_steps="a"), TypeError, "warmup_steps must be an integer"),  # pyright: ignore[reportArgumentType]
    "half a step": (lambda: ClipSchedule(warmup_steps=1.5, peak_lr=0.1), TypeError, "got 1.5"),  # pyright: ignore[reportArgumentType]
    "total type": (lambda: ClipSchedule(total_steps=10.5), TypeError, "total_steps must be"),  # pyright: ignore[reportArgumentType]
    "peak type": (lambda: ClipSchedule(3, "1e-3"), TypeError, "peak_lr must be a number"),  # pyright: ignore[reportArgumentType]
    "decay type": (lambda: ClipSchedule(decay=None), TypeError, "decay must be one of"),  # pyright: ignore[reportArgumentType]
    "final": (lambda: ClipSchedule(final_scale=-0.1), ValueError, "final_scale=-0.1"),
    "final type": (lambda: ClipSchedule(final_scale="0"), TypeError, "final_scale must be"),  # pyright: ignore[reportArgumentType]
    "fraction": (lambda: ClipSchedule(decay_fraction=0.0), ValueError, "decay_fraction"),
    "radius": (lambda: Hypersphere("large"), ValueError, "'fixed', 'current'"),
    "eps": (lambda: Hypersphere(eps=0.0), ValueError, "eps=0.0 must be positive"),
    "eps type": (lambda: Hypersphere(eps="a"), TypeError, "eps must be a positive number"),  # pyright: ignore[reportArgumentType]
    "no names": (lambda: SpectralClip(apply_to=[]), TypeError, "apply_to must be .* got \\[\\]"),
    "option": (
        lambda: fused_optim.AdamW([torch.ones(2, 2)], spectral=10.0),  # pyright: ignore[reportArgumentType]
        TypeError,
        "SpectralClip or a Hypersphere",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_options(name: str) -> None:
    make, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.float64), "float64"),
        (torch.zeros(4, 4, dtype=torch.complex64), "complex64"),
        (torch.zeros(3, 4, 2, 2).transpose(0, 1), "outermost"),
        (torch.zeros(5, 4), "does not fit"),
    ],
    ids=["fp64", "complex", "conv", "split"],
)
def test_parameters_without_matrices(param: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        fused_optim.AdamW([("blocks.weight", param)], spectral=SpectralClip(split={"blocks.*": (2, 2)}))
    assert "parameter 0 of group 0 ('blocks.weight')" in str(refused.value)


def test_a_threshold_that_ends_at_zero() -> None:
    for decay in ("exp", "linear"):
        schedule = ClipSchedule(total_steps=10, decay=decay, decay_fraction=0.5, final_scale=0.0)
        assert [schedule(4.0, 0.1, step) for step in (6, 11)] == [4.0, 0.0]
    weight = torch.nn.Parameter(torch.zeros(30, 30))
    clip = SpectralClip(1.0, schedule=ClipSchedule(total_steps=1, decay="exp", final_scale=0.0))
    optimizer = fused_optim.SGD([weight], lr=1.0, spectral=clip)
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.dist(weight.detach(), before) < 1e-20


@pytest.mark.parametrize("make", [SpectralClip, Hypersphere])
def test_scalars_are_refused_before_the_first_step(make: Any) -> None:
    params = [("w", torch.nn.Parameter(torch.ones(4, 4))), ("s", torch.nn.Parameter(torch.ones(())))]
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 \('s'\) is a scalar"):
        fused_optim.AdamW(params, spectral=make(apply_to=lambda name, _: name == "s"))
    fused_optim.AdamW(params, spectral=make(apply_to="all"))


def test_patterns_need_names() -> None:
    for spectral, option in (
        (SpectralClip(apply_to="*weight"), "apply_to"),
        (SpectralClip(apply_to=["matrices", "*weight"]), "apply_to"),
        (SpectralClip(split={"*qkv*": 3}), "split"),
        (Hypersphere(apply_to="*weight"), "apply_to"),
    ):
        with pytest.raises(ValueError, match=f"{option} has the name patterns .* came without a name"):
            fused_optim.AdamW([torch.nn.Parameter(torch.ones(6, 4))], spectral=spectral)
    with pytest.raises(ValueError, match="split has the name patterns"):
        fused_optim.Muon([torch.nn.Parameter(torch.ones(6, 4))], split={"*qkv*": 3})


def test_stacks_of_fused_matrices() -> None:
    stack = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    fused = torch.nn.Parameter(torch.zeros_like(stack))
    parts = [torch.nn.Parameter(torch.zeros(3, 4, 6)) for _ in range(2)]
    one = fused_optim.SGD([("gate_up", fused)], lr=1.0, spectral=SpectralClip(0.5, split={"gate_up": 2}))
    two = fused_optim.SGD(parts, lr=1.0, spectral=SpectralClip(0.5))
    fused.grad = stack.clone()
    for part, grad in zip(parts, stack.chunk(2, dim=1), strict=True):
        part.grad = grad.clone()
    one.step()
    two.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts], dim=1))
