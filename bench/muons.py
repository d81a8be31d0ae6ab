"""Muon of this and other libraries: whole steps, checked against float64 before they are timed."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_optim.newton_schulz import SCALES

from .comparison import Absent, Case, Contender
from .peers import MissingPeerError, Peer

JORDAN = (3.4445, -4.7750, 2.0315)
HYPER = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
ALLOWED_ERROR = 0.1
"""Of the first step, relative: iterations in bf16 are off by 0.02, those with other coefficients by more."""


def polynomials(X: Tensor, steps: int) -> Tensor:
    """Jordan's iteration in float64."""
    Y = X.double() if X.shape[-2] <= X.shape[-1] else X.mT.double()
    Y = Y / torch.linalg.matrix_norm(Y, keepdim=True)
    for _ in range(steps):
        A = Y @ Y.mT
        Y = JORDAN[0] * Y + (JORDAN[1] * A + JORDAN[2] * A @ A) @ Y
    return Y if X.shape[-2] <= X.shape[-1] else Y.mT


def distance(found: Tensor, expected: Tensor) -> float:
    return (torch.dist(found.double(), expected) / expected.norm()).item()


def _original(lr: float, shape: Sequence[int]) -> float:
    return lr * SCALES["original"](shape[-2], shape[-1])


_CLASS = {"muon": "Muon"}
_GRAM = {"ns_coefficients": [JORDAN] * 5, "adjust_lr": _original}
# muonium's batched Nesterov step writes into the gradients, which the contenders share.
_MUONIUM = {"orthogonalization_strategy": "newton_schulz", "use_cautious_wd": False, "nesterov": False}

MUONS: Mapping[str, Peer] = {
    "fused_optim.Muon": Peer("fused_optim", "fused_optim", _CLASS),
    "torch.optim.Muon": Peer("torch", "torch.optim", _CLASS),
    "pytorch-optimizer": Peer("pytorch-optimizer", "pytorch_optimizer", _CLASS, group={"use_muon": True}),
    "gram-newton-schulz": Peer("gram-newton-schulz", "gram_newton_schulz", _CLASS, _GRAM, device="cuda"),
    "gram-newton-schulz torch": Peer(
        "gram-newton-schulz", "gram_newton_schulz", _CLASS, {**_GRAM, "ns_use_kernels": False}
    ),
    "muonium": Peer("muonium", "muonium", _CLASS, _MUONIUM, names={"weight_decay": "wd"}, device="cuda"),
}
"""Ours first; all with the same coefficients, scales and hyperparameters."""


class Steps:
    """An optimizer over matrices that begin at zero, with gradients that it shares with the others."""

    def __init__(self, peer: Peer, gradients: Sequence[Tensor]) -> None:
        self.params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient
        self.step = peer.make("muon", self.params, HYPER).step

    def check(self, expected: Mapping[int, Tensor]) -> float:
        """Takes the first step; the largest relative error of the matrices whose change is known."""
        self.step()
        return max(distance(self.params[index].detach(), change) for index, change in expected.items())


def first_changes(gradients: Sequence[Tensor]) -> dict[int, Tensor]:
    """What the first step does to one matrix of every shape, in float64."""
    first = {gradient.shape: index for index, gradient in reversed(list(enumerate(gradients)))}
    return {
        index: -_original(HYPER["lr"], shape) * polynomials(gradients[index], 5)
        for shape, index in first.items()
    }


def checked(
    label: str, check: Callable[[], tuple[Callable[[], Any], float]], flops: int | None = None
) -> Contender | Absent:
    """A contender if ``check`` returns what to call and a small error, or the reason to leave it out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call, error = check()
    except MissingPeerError as missing:
        return Absent(label, "missing", str(missing))
    except Exception as failure:
        # A peer may fail in any way; the table says so and the others are timed.
        return Absent(label, "failed", f"{type(failure).__name__}: {failure}"[:300])
    if not error <= ALLOWED_ERROR:
        return Absent(label, "wrong", f"relative error {error:.1e}, allowed {ALLOWED_ERROR:.0e}")
    return Contender(label, call, lambda: error, flops)


def admit(
    label: str, peer: Peer, gradients: Sequence[Tensor], expected: Mapping[int, Tensor]
) -> Contender | Absent:
    """A contender whose first step is right, or the reason to leave it out."""

    def check() -> tuple[Callable[[], Any], float]:
        steps = Steps(peer, gradients)
        return steps.step, steps.check(expected)

    return checked(label, check)


def whole_step(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """``step()`` itself: momentum, matrices, weight decay and parameters in fp32."""
    d, d_ff, layers = args.width, 4 * args.width, args.layers
    layer = [(d, d)] * 4 + [(d_ff, d), (d_ff, d), (d, d_ff)]
    gradients = [torch.randn(shape, device=device) for shape in layer * layers]
    expected = first_changes(gradients)
    found = [admit(label, peer, gradients, expected) for label, peer in MUONS.items()]
    contenders = [one for one in found if isinstance(one, Contender)]
    absent = [one for one in found if isinstance(one, Absent)]
    if found[0] in absent:
        raise RuntimeError(f"{absent[0].label} is {absent[0].status}: {absent[0].reason}")
    limit = 0.5 if device.type == "cuda" else 0.75
    title = f"Muon.step(), {layers} layers of {d}"
    return [Case(title, contenders, {"torch.optim.Muon": limit}, absent)]
