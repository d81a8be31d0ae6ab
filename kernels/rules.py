"""The catalogue of rules: slots, scalars and how a step's scalars follow from hyperparameters.

``g_scale`` (sign of ``maximize``, loss scale, clip factor) belongs to every rule and is not listed.
"""

from __future__ import annotations

from typing import Any

from .spec import Hyper, Rule, Slot


def _adam(h: Hyper, t: Any) -> tuple[Any, ...]:
    beta1, beta2 = h["betas"]
    decoupled = h["decoupled_weight_decay"]
    return (
        0.0 if decoupled else h["weight_decay"],
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**t) ** -0.5,
        h["eps"],
        h["lr"] / (1 - beta1**t),
        h["lr"] * h["weight_decay"] if decoupled else 0.0,
    )


def _lion(h: Hyper, t: Any) -> tuple[Any, ...]:
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, beta2, 1 - beta2, h["lr"], h["lr"] * h["weight_decay"]


def _sgd(h: Hyper, t: Any) -> tuple[Any, ...]:
    return h["weight_decay"], h["lr"], 0.0


def _sgd_momentum(h: Hyper, t: Any) -> tuple[Any, ...]:
    # The first step stores the gradient itself: dampening starts with the second.
    first = (t <= 1) * 1.0
    momentum = h["momentum"]
    nesterov = bool(h["nesterov"])
    return (
        h["weight_decay"],
        momentum * (1 - first),
        1 - h["dampening"] * (1 - first),
        1.0 if nesterov else 0.0,
        momentum if nesterov else 1.0,
        h["lr"],
    )


def _muon(h: Hyper, t: Any) -> tuple[Any, ...]:
    momentum, nesterov = h["momentum"], bool(h["nesterov"])
    looking_ahead = (1 - momentum, momentum) if nesterov else (0.0, 1.0)
    return 0.0, momentum, 1 - momentum, *looking_ahead, h["lr"]


def _cast(h: Hyper, t: Any) -> tuple[Any, ...]:
    beta1, beta2 = h["betas"]
    progress, c1 = h["sparsity"].progress(t), 1 / (1 - beta1**t)
    return (
        1 - beta1,
        beta2,
        1 - beta2,
        c1 if h["corrects_second_moment"] else 1.0,
        (1 - beta2**t) ** -0.5,
        h["eps"],
        h["lr"] * c1,
        1 - progress,
        progress * h["l1"],
    )


_ADAM = ("l2", "w1", "b2", "w2", "c2", "eps", "step_size", "decay")
_MOMENTUM = ("l2", "mu", "w", "ng", "nb", "lr")
_BUFFER = Slot("momentum_buffer")
_M, _V, _VMAX = Slot("exp_avg"), Slot("exp_avg_sq", signed=False), Slot("max_exp_avg_sq", signed=False)

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("adam", (_M, _V), _ADAM, _adam),
        Rule("adam_amsgrad", (_M, _V, _VMAX), _ADAM, _adam),
        Rule("lion", (_M,), ("b1", "w1", "b2", "w2", "lr", "decay"), _lion),
        Rule("sgd", (), ("l2", "lr", "decay"), _sgd),
        Rule("sgd_momentum", (_BUFFER,), _MOMENTUM, _sgd_momentum),
    )
}

MUON = Rule("sgd_momentum", (_BUFFER,), _MOMENTUM, _muon)
"""Muon's momentum is an average; its kernel is heavy ball's."""

CAST_ADAM = Rule(
    "cast_adam", (_M, _V), ("w1", "b2", "w2", "c1", "c2", "eps", "step_size", "kept_part", "l1"), _cast
)
"""CAST's AdamS: it exists inside of a masked rule only, because it looks at the mask."""
