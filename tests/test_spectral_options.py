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
    "fraction": (lambda: ClipSchedule(decay_fraction=0.0), ValueError, "decay_fraction"),
    "radius": (lambda: Hypersphere("large"), ValueError, "'fixed', 'current'"),
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
