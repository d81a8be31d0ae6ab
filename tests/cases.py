"""What the tests run over: the product of the catalogues, the targets, tensors with every special value.

A new rule or codec in the catalogues is tested without an edit here or in any test.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_optim.kernels.codecs import CODECS, OF_DTYPE, PARAM_CODECS, STATE_CODECS, for_slot
from fused_optim.kernels.masking import GROUPS, masked
from fused_optim.kernels.rules import CAST_ADAM, RULES
from fused_optim.kernels.spec import Codec, Rule

SIZES = (0, 1, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097)
SMALL_SIZES = (0, 1, 15, 16, 17, 255, 256, 257)
FLOATS = [CODECS[name] for name in OF_DTYPE.values() if CODECS[name].compute == "float32"]
"""The codecs that a tensor's dtype stands for: what gradients may have."""
PARAMS = [CODECS[name] for name in PARAM_CODECS if CODECS[name].compute == "float32"]
STATES = [name for name in STATE_CODECS if CODECS[name].compute == "float32"]
DTYPES = {codec.name: getattr(torch, codec.planes[0].dtype) for codec in CODECS.values()}


class Target(NamedTuple):
    """A backend on a kind of device."""

    backend: str
    device: str


_COMPILED = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1"
NATIVE = pytest.param(Target("native", "cpu"), id="native")
INTERPRETER = pytest.param(
    Target("triton", "cpu"),
    id="triton_interpreter",
    marks=pytest.mark.skipif(_COMPILED, reason="Triton compiles for the GPU in this process"),
)
GPU = [
    pytest.param(Target(backend, "cuda"), id=f"{backend}_gpu", marks=pytest.mark.gpu)
    for backend in ("triton", "cuda")
]
REFERENCE = pytest.param(Target("reference", "cpu"), id="reference")
TARGETS = [NATIVE, INTERPRETER, *GPU]
EVERY_TARGET = [REFERENCE, *TARGETS]


class Case(NamedTuple):
    """A rule and the storage of everything that it touches."""

    rule: Rule
    param: Codec
    grad: Codec
    states: tuple[Codec, ...]

    @property
    def id(self) -> str:
        states = "_".join(codec.name for codec in self.states) or "none"
        of = "" if self.rule.inner is None else f"_of_{self.rule.group}"
        return f"{self.rule.name}{of}-p_{self.param.name}-g_{self.grad.name}-s_{states}"


def states_of(rule: Rule, names: Sequence[str]) -> tuple[Codec, ...]:
    """The codecs of a rule's slots, by the names that a user would give."""
    return tuple(for_slot(name, slot.signed) for name, slot in zip(names, rule.slots, strict=True))


def all_cases(rules: Iterable[Rule] = RULES.values()) -> list[Case]:
    """Every rule with every plain storage of parameter, gradient and each state."""
    return [
        Case(rule, param, grad, states)
        for rule in rules
        for param, grad, *states_list in itertools.product(FLOATS, repeat=2 + len(rule.slots))
        for states in [tuple(states_list)]
    ]


def pairwise_cases(rules: Iterable[Rule] = RULES.values()) -> list[Case]:
    """Few cases in which any two storages of a rule meet: an orthogonal array over a prime field."""
    chosen: dict[Case, None] = {}
    for rule in rules:
        levels = [len(PARAMS), len(FLOATS), *[len(STATES)] * len(rule.slots)]
        prime = next(p for p in itertools.count(max(levels)) if all(p % q for q in range(2, p)))
        for a, b in itertools.product(range(prime), repeat=2):
            index = [(a + factor * b) % prime % level for factor, level in enumerate(levels)]
            states = states_of(rule, [STATES[i] for i in index[2:]])
            chosen[Case(rule, PARAMS[index[0]], FLOATS[index[1]], states)] = None
    return list(chosen)


def representative_cases() -> list[Case]:
    """For what is slow: every storage of everything at least once, with neighbours that change."""
    count = max(len(PARAMS), len(STATES))
    return [
        Case(
            rule,
            PARAMS[i % len(PARAMS)],
            FLOATS[i % len(FLOATS)],
            states_of(rule, [STATES[(i + 5 * slot) % len(STATES)] for slot in range(len(rule.slots))]),
        )
        for rule in RULES.values()
        for i in range(count if rule.slots else len(PARAMS))
    ]


def main_cases() -> list[Case]:
    """What people train with: everything in one format, or narrow parameters with fp32 states."""
    storages = [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32")]
    storages += [("fp32", "int8"), ("bf16_split8", "int8_companded"), ("bf16_sr", "int4"), ("blank", "fp32")]
    without_states = {param: (param, state) for param, state in reversed(storages)}.values()
    return [
        Case(rule, CODECS[param], plain(CODECS[param]), states_of(rule, [state] * len(rule.slots)))
        for rule in RULES.values()
        for param, state in (storages if rule.slots else without_states)
    ]


def masked_cases(groups: Sequence[int] = (0, *GROUPS)) -> list[Case]:
    """Every rule with a mask, in place and with dense weights, of every size of groups."""
    kinds = itertools.product((*RULES.values(), CAST_ADAM), groups, (False, True))
    chosen = []
    for i, (inner, group, keeps_dense) in enumerate(kinds):
        rule = masked(inner, group, keeps_dense)
        weights = PARAMS[i % len(PARAMS)]
        names = [STATES[(2 * i + 5 * slot) % len(STATES)] for slot in range(len(inner.slots))]
        further = (CODECS["mask"], *((weights,) if keeps_dense else ()))
        states = (*states_of(inner, names), *further)
        param = FLOATS[i % len(FLOATS)] if keeps_dense else weights
        chosen.append(Case(rule, param, FLOATS[(i + i // 3) % len(FLOATS)], states))
    return chosen


def plain(codec: Codec) -> Codec:
    """The codec that stores a parameter's dtype as it is, as its gradient has it."""
    return CODECS[OF_DTYPE[codec.planes[0].dtype]]


class Recipe(NamedTuple):
    """Stands for a recipe of fused_optim.sparsity: what becomes of pruned weights, and when masks are new."""

    grad: float
    decay: float
    scale: float
    kept: int
    every: int

    def row(self, t: Any) -> tuple[Any, ...]:
        new = (t % self.every == 0) * 1.0
        return self.grad, self.decay, self.scale, self.kept * new

    def progress(self, t: Any) -> Any:
        return (t - 1) / 100


def hypers(rule: Rule) -> list[dict[str, Any]]:
    """Two parameter groups whose options reach every scalar of a rule's row."""
    betas = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.9, "dampening": 0.25, "nesterov": False}
    betas |= {"seed": 0x9ABCDEF0}
    if rule.inner is not None:
        betas |= {"sparsity": Recipe(1.0, 0.02, 0.25, kept=1, every=1)}
        betas |= {"l1": 0.5, "corrects_second_moment": True}
    first = {"lr": 0.01, "weight_decay": 0.1, "maximize": False, "decoupled_weight_decay": True, **betas}
    coupled = {"lr": 0.003, "weight_decay": 0.02, "maximize": True, "decoupled_weight_decay": False}
    second = {**first, **coupled, "betas": (0.4, 0.999), "dampening": 0.0, "nesterov": True}
    if rule.inner is not None:
        half = max(1, rule.group // 2)
        second |= {"sparsity": Recipe(0.0, 0.0, 0.0, half, every=2), "corrects_second_moment": False}
    return [first, second]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The memory of every element as an integer, with all NaNs made one."""
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    raw = tensor.contiguous().view(_BITS[tensor.element_size()])
    return torch.where(tensor.isnan(), -1, raw) if tensor.is_floating_point() else raw


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Fails with the first elements that differ."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} instead of {expected.shape}"
    a, b = bits(actual), bits(expected)
    if torch.equal(a, b):
        return
    where = (a != b).nonzero()[:4].tolist()
    shown = [
        (
            i,
            actual.detach().cpu()[tuple(i[: actual.ndim])].item(),
            expected.cpu()[tuple(i[: actual.ndim])].item(),
        )
        for i in where
    ]
    count = int((a != b).sum())
    raise AssertionError(f"{what}: {count} of {a.numel()} differ; (index, actual, expected): {shown}")


def normal(shape: Sequence[int] | int, dtype: torch.dtype, seed: int) -> Tensor:
    """Gaussian values over several orders of magnitude."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1, shape)
    return torch.as_tensor(values).to(dtype)


def wild(numel: int, dtype: torch.dtype, seed: int, step: int = 1) -> Tensor:
    """Gradients with NaN of many payloads, infinities, denormals, zeros of both signs and huge values.

    Non-finite values keep to their own elements, so that the others stay comparable for many steps.
    """
    return _wild(numel, dtype, seed, step).clone()


def tame(numel: int, dtype: torch.dtype, seed: int, step: int = 1) -> Tensor:
    """Gradients whose squares are finite, for states whose blocks share their NaN: among them zeros,
    denormals and blocks of very different size."""
    return _tame(numel, dtype, seed, step).clone()


@cache
def _tame(numel: int, dtype: torch.dtype, seed: int, step: int) -> Tensor:
    values = normal(numel, dtype, 1000 * seed + step).float()
    values *= 10.0 ** -(torch.arange(numel) // 300 % 9).float()
    values[torch.arange(numel) % 11 == 3] = 0.0
    values[(torch.arange(numel) + step) % 17 == 5] *= 1e-30
    values[torch.arange(numel) // 512 % 7 == 6] = 0.0
    return values.to(dtype)


@cache
def _wild(numel: int, dtype: torch.dtype, seed: int, step: int) -> Tensor:
    values = normal(numel, dtype, 1000 * seed + step)
    rng, lanes = np.random.default_rng(seed + 7919 * step), torch.arange(numel)
    info, inf = torch.finfo(dtype), float("inf")
    smallest = info.smallest_normal
    finite = [0.0, -0.0, smallest, -smallest / 4, smallest / 64, info.max, -info.max, 1e-40, 1e-22, 1e20]

    def draw(lane: int, period: int, choices: list[float]) -> None:
        mine = lanes % period == lane
        values[mine] = torch.as_tensor(rng.choice(choices, int(mine.sum())), dtype=torch.float64).to(dtype)

    draw(5, 13, finite)
    draw(11, 41, [inf, -inf, 1.0, info.max])
    draw(0 if step % 3 else 1, 62, [float("nan")])
    raw, nans = values.view(_BITS[dtype.itemsize]), values.isnan()
    # A quiet NaN's own bits with some of the lower ones and the sign flipped is a NaN still.
    raw[nans] ^= torch.as_tensor(rng.integers(0, 60, int(nans.sum()))).to(raw.dtype)
    raw[nans] |= torch.as_tensor(rng.choice([0, torch.iinfo(raw.dtype).min], int(nans.sum()))).to(raw.dtype)
    return values
