"""Every rule with every storage on every backend: the same bits as the reference driver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_optim
from fused_optim import FusedOptimizer
from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.spec import Codec, Rule
from tests import cases
from tests.arena import Bed, assert_equal_beds
from tests.cases import Case, Target, assert_same_bits

REFERENCE, INTERPRETER = Target("reference", "cpu"), Target("triton", "cpu")
SHORT = (257, 515, 17, 40, 300)
"""Misaligned tensors of a chunk: the interpreter takes as long for one as for a whole aligned tile."""

FEW_STEPS = 0.8
"""Share that moves in one or two steps: int8_companded does not resolve a percent of Lion's momentum."""


class _BedOfMany(Bed):
    """Its gradients are pieces of one tensor: to draw thousands takes longer than to step with them."""

    def gradient(self, index: int, step: int) -> Tensor:
        numel, dtype = self._sizes[index][0], cases.DTYPES[self.case.grad.name]
        return cases.wild(8192, dtype, self._seed, step)[index : index + numel]


def _compare(
    case: Case,
    target: Target,
    sizes: Sequence[int],
    steps: int,
    seed: int,
    bed_of: type[Bed] = Bed,
    moving: float = 0.9,
    **options: Any,
) -> None:
    if target == INTERPRETER:
        options["odd_sizes"] = SHORT
    bed = bed_of(case, target, sizes, seed=seed, **options)
    options.pop("steps_on_device", None)
    expected = bed_of(case, REFERENCE, sizes, seed=seed, **options)
    before = expected.snapshot()
    for _ in range(steps):
        bed.step()
        expected.step()
    assert_equal_beds(bed, expected)
    bed.assert_intact()
    moved = [not torch.equal(a, b) for a, (_, b) in zip(before, expected.named(), strict=True) if a.numel()]
    assert sum(moved) > moving * len(moved), "a reference that stands still proves nothing"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("target", [cases.NATIVE, *cases.GPU])
@pytest.mark.parametrize("case", cases.all_cases(), ids=lambda case: case.id)
def test_every_storage(case: Case, target: Target) -> None:
    _compare(case, target, cases.SIZES, steps=20, seed=1)


@pytest.mark.parametrize("target", [cases.NATIVE, *cases.GPU])
@pytest.mark.parametrize("case", cases.pairwise_cases(), ids=lambda case: case.id)
def test_every_pair_of_storages(case: Case, target: Target) -> None:
    _compare(case, target, (0, 1, 17, 4097), steps=2, seed=8, odd_sizes=SHORT, moving=FEW_STEPS)


@pytest.mark.parametrize("target", [cases.INTERPRETER])
@pytest.mark.parametrize("case", cases.main_cases(), ids=lambda case: case.id)
def test_main_storages_through_the_interpreter(case: Case, target: Target) -> None:
    # A step of codes and random bits takes the interpreter several times as long.
    plain = all(codec in cases.FLOATS for codec in (case.param, *case.states))
    _compare(case, target, (0, 1, 17, 4097), steps=4 if plain else 2, seed=2)


@pytest.mark.parametrize("target", [cases.INTERPRETER])
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_every_size_through_the_interpreter(rule: Rule, target: Target) -> None:
    states = (CODECS["fp32"],) * len(rule.slots)
    _compare(Case(rule, CODECS["bf16"], CODECS["bf16"], states), target, cases.SIZES, steps=2, seed=4)


@pytest.mark.parametrize("target", [cases.INTERPRETER])
@pytest.mark.parametrize("case", cases.representative_cases(), ids=lambda case: case.id)
def test_every_storage_through_the_interpreter(case: Case, target: Target) -> None:
    # A tensor that is some steps old is decoded in the first step already.
    _compare(case, target, (1, 16, 17, 2049), steps=1, seed=3, moving=FEW_STEPS)


@pytest.mark.parametrize("case", cases.pairwise_cases(), ids=lambda case: case.id)
@pytest.mark.parametrize("target", cases.GPU)
def test_step_counts_on_the_device(case: Case, target: Target) -> None:
    _compare(case, target, cases.SIZES, steps=20, seed=5, steps_on_device=True)


@pytest.mark.parametrize("rule", ["adam", "lion"])
@pytest.mark.parametrize("target", cases.TARGETS)
def test_thousands_of_tensors_at_once(rule: str, target: Target) -> None:
    interpreted = target == INTERPRETER
    bf16, fp32 = CODECS["bf16"], CODECS["fp32"]
    case = Case(RULES[rule], bf16, fp32, (fp32,) * len(RULES[rule].slots))
    count = 100 if interpreted else 2000
    sizes = [i % 43 for i in range(count)]
    _compare(case, target, sizes, steps=1 if interpreted else 2, seed=6, bed_of=_BedOfMany)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    case = Case(RULES["adam"], CODECS["fp32"], CODECS["fp32"], (CODECS["fp32"], CODECS["bf16"]))
    _compare(case, Target("native", "cpu"), [*cases.SIZES, 100_003, 65_536], steps=3, seed=7)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("target", cases.EVERY_TARGET)
def test_inactive_rows_leave_their_tensors_alone(rule: Rule, target: Target) -> None:
    case = Case(rule, CODECS["bf16"], CODECS["fp32"], (CODECS["fp32"],) * len(rule.slots))
    bed = Bed(case, target, (1, 16, 255, 257, 4097))
    bed.step()
    bucket, before = bed.bucket(), bed.snapshot()
    # The second group sleeps; its other scalars are such that one multiplication with them would show.
    asleep = torch.tensor([group == 1 for group, _ in bucket.cohorts])
    assert asleep.any() and not asleep.all()
    rows = torch.tensor([1.0, 0.5, 0.0, 0.0, *[0.25] * len(rule.scalars)]).repeat(len(asleep), 1)
    rows[asleep] = float("nan")
    rows[asleep, 0] = 0.0
    bucket.rows.copy_(rows)
    bucket.grads = [member.param.grad for member in bucket.members]
    bucket.driver.step(bucket)
    for (name, value), old in zip(bed.named(), before, strict=True):
        index = int(name.split("tensor ")[1].split()[0])
        if name.endswith("step") or bed.members[index].group == 1:
            assert_same_bits(value, old, name)
        elif name.endswith("parameter"):
            assert not torch.equal(value, old), f"{name} did not move"
    bed.assert_intact()


@pytest.mark.parametrize("grad", cases.FLOATS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("target", cases.EVERY_TARGET)
def test_square_sum(grad: Codec, target: Target) -> None:
    fp32 = CODECS["fp32"]
    sizes = (*cases.SIZES, 511, 513, 12_289 if target == INTERPRETER else 70_001)
    bed = Bed(Case(RULES["adam"], fp32, grad, (fp32, fp32)), target, sizes, odd_sizes=SHORT)
    tensors = [member.param.grad for member in bed.members]
    for index, tensor in enumerate(tensors):
        values = cases.normal(tensor.numel(), tensor.dtype, seed=index)
        # The square of the largest value overflows in fp32, a denormal's vanishes.
        values[:1], values[1:2] = torch.finfo(values.dtype).max, 1e-40
        tensor.copy_(values)
    bucket = bed.bucket()
    assert bucket.collect()
    expected = math.fsum(x * x for tensor in tensors for x in tensor.double().flatten().tolist())
    total = bucket.driver.square_sum(bucket)
    assert total.dtype == torch.float64 and total.shape == () and total.device.type == target.device
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert bucket.driver.square_sum(bucket).item() == total.item(), "the same gradients gave another sum"
    for position in (0, -1):
        for value in (float("inf"), float("-inf"), float("nan")):
            poisoned = tensors[-1][position].clone()
            tensors[-1][position] = value
            assert bucket.collect()
            assert not math.isfinite(bucket.driver.square_sum(bucket).item())
            tensors[-1][position] = poisoned
    assert bucket.driver.square_sum(bucket).item() == total.item()


CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fused_optim.AdamW, {"weight_decay": 0.1, "lr": 0.01}),
    "AdamW-amsgrad": (fused_optim.AdamW, {"amsgrad": True, "lr": 0.01}),
    "Adam": (fused_optim.Adam, {"weight_decay": 0.1, "maximize": True, "lr": 0.01}),
    "Lion": (fused_optim.Lion, {"weight_decay": 0.1, "lr": 0.01}),
    "SGD": (fused_optim.SGD, {"weight_decay": 0.1, "lr": 0.01}),
    "SGD-momentum": (fused_optim.SGD, {"momentum": 0.9, "dampening": 0.5, "lr": 0.01}),
}


@pytest.mark.parametrize("state", ["auto", *(codec.name for codec in cases.FLOATS), "mixed"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", cases.TARGETS)
def test_public_classes(name: str, state: str, target: Target) -> None:
    """All dtypes in one optimizer, through ``step()``, against the class's own reference backend."""
    optimizer_class, options = CLASSES[name]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    probe = optimizer_class([torch.zeros(1, requires_grad=True)], **options)
    slots = [slot.name for slot in probe._rule(probe.param_groups[0]).slots]
    mixed = dict(zip(slots, ("bf16", "fp16", "fp32"), strict=False))
    options = {**options, "state_codec": mixed if state == "mixed" else state}
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 5), (257,)]

    def run(backend: str, device: str) -> tuple[list[Tensor], FusedOptimizer]:
        params = [
            cases.normal(shape, dtype, seed=len(shape)).to(device).requires_grad_()
            for dtype in dtypes
            for shape in shapes
        ]
        optimizer = optimizer_class(params, **options, backend=backend, arithmetic="exact")
        for step in range(3):
            for index, param in enumerate(params):
                param.grad = cases.wild(param.numel(), param.dtype, index, step).view_as(param).to(device)
            optimizer.step()
        return params, optimizer

    params, optimizer = run(target.backend, target.device)
    expected_params, expected = run("reference", "cpu")
    for param, other in zip(params, expected_params, strict=True):
        assert_same_bits(param, other, f"{param.dtype} parameter of shape {tuple(param.shape)}")
        assert list(optimizer.state[param]) == list(expected.state[other])
        for key, value in optimizer.state[param].items():
            assert_same_bits(
                value, expected.state[other][key], f"{key} of {tuple(param.shape)} {param.dtype}"
            )
            if key != "step":
                codec = mixed[key] if state == "mixed" else "fp32" if state == "auto" else state
                assert value.dtype == cases.DTYPES[codec]
