"""Tensors between guard bytes, and a bed: one bucket of them, stepped without the public classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused_optim.kernels import dispatch
from fused_optim.kernels.bucket import Bucket, Member
from fused_optim.kernels.control import Control
from fused_optim.kernels.launch import Key
from fused_optim.kernels.plan import build
from fused_optim.kernels.reference.codecs import CODECS as REFERENCE
from fused_optim.kernels.reference.philox import Stream
from fused_optim.kernels.spec import Codec
from tests.cases import DTYPES, Case, Target, assert_same_bits, hypers, normal, tame, wild

_GUARD, _PATTERN = 64, 0xA5


class Arena:
    """Memory in which every tensor has guard bytes on both sides."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._blocks: list[tuple[Tensor, int, int]] = []

    def tensor(self, values: Tensor, misaligned: bool = False) -> Tensor:
        """A copy of ``values``, 64-byte aligned or one element beyond."""
        start = _GUARD + misaligned * values.element_size()
        stop = start + values.numel() * values.element_size()
        memory = torch.full((stop + _GUARD,), _PATTERN, dtype=torch.uint8, device=self.device)
        self._blocks.append((memory, start, stop))
        return memory[start:stop].view(values.dtype).view(values.shape).copy_(values)

    def assert_guards(self) -> None:
        """Fails if any byte outside of the tensors has changed."""
        for memory, start, stop in self._blocks:
            outside = torch.cat([memory[:start], memory[stop:]])
            assert (outside == _PATTERN).all(), f"bytes beside {stop - start} bytes were overwritten"


class Owner:
    """Stands for a parameter whose gradient has any dtype, for which torch needs ``grad_dtype`` (2.9)."""

    def __init__(self, tensor: Tensor, grad: Tensor) -> None:
        self.tensor, self.grad = tensor, grad

    def numel(self) -> int:
        return self.tensor.numel()


def _local(held: Any) -> Tensor:
    return held.tensor if isinstance(held, Owner) else held


# Beds that are compared begin alike, and many cases share storage.
@cache
def _planes(codec: Codec, numel: int, seed: int, kind: str) -> Sequence[Tensor]:
    """What a codec makes of weights, a state of some steps or of none, or a mask."""
    values = normal(numel, torch.float32, seed)
    if kind == "mask":
        values = (values > 0).float()
    elif kind == "unsigned":
        values = values.abs()
    elif kind == "zero":
        values = torch.zeros_like(values)
    return REFERENCE[codec.name].encode(values, Stream(1, 2, 3, 4))


class Bed:
    """Guarded tensors of a case, in two groups, half of them already some steps old."""

    def __init__(
        self,
        case: Case,
        target: Target,
        sizes: Sequence[int],
        *,
        seed: int = 0,
        odd_sizes: Sequence[int] = (257, 4096, 17, 257, 4096),
        steps_on_device: bool = False,
    ) -> None:
        self.case, self.arena, self.hypers = case, Arena(target.device), hypers(case.rule)
        driver = dispatch.choose(target.device, (case.param, *case.states), target.backend)
        device = torch.device(target.device, 0) if target.device == "cuda" else torch.device(target.device)
        key = Key(device, case.rule, case.param, case.grad, case.states, driver, True)
        planes = 2 + len(case.states)
        # Beside the sizes asked for: one tensor per plane in which just this plane is misaligned.
        odd = [(size, plane) for plane, size in zip(range(planes), odd_sizes, strict=False)]
        self._sizes = [(size, -1) for size in sizes] + odd
        self._seed, self.step_number = seed, 0
        self._grads = [self._gradients() for _ in range(2)]
        # Members of a group stand side by side, as in an optimizer.
        self._order = sorted(range(len(self._sizes)), key=lambda index: index % 2)
        self.members = [self._member(key, index) for index in self._order]
        self.buckets = build(self.members, steps_on_device)

    def _gradients(self) -> list[Tensor]:
        dtype = DTYPES[self.case.grad.name]
        return [self.arena.tensor(torch.zeros(n, dtype=dtype), odd == 1) for n, odd in self._sizes]

    def _member(self, key: Key, index: int) -> Member:
        (numel, odd), case, tensor = self._sizes[index], self.case, self.arena.tensor
        seed = self._seed + 10 * index
        started = index % 4 == 3
        state: dict[str, Any] = {"step": torch.tensor(3.0 if started else 0.0)}
        param, *rest = _planes(case.param, numel, seed, "weights")
        names = [plane.suffix for plane in case.param.planes[1:]]
        state |= {"param" + name: tensor(plane, odd == 0) for name, plane in zip(names, rest, strict=True)}
        for i, (slot, codec) in enumerate(zip(case.rule.slots, case.states, strict=True)):
            of_age = "zero" if not started else "signed" if slot.signed else "unsigned"
            planes = _planes(codec, numel, seed + i + 1, slot.codec or of_age)
            for plane, values in zip(codec.planes, planes, strict=True):
                state[slot.name + plane.suffix] = tensor(values, odd == 2 + i)
        owner: Any = Owner(tensor(param, odd == 0), self._grads[0][index])
        return Member(key, index % 2, owner, state, _local, ordinal=3 * index, drawn=index * (2**32 - 3))

    def step(self, control: Control | None = None) -> None:
        """One step with new gradients at the other of two addresses."""
        self.step_number += 1
        grads = self._grads[self.step_number % 2]
        for index, grad in enumerate(grads):
            grad.copy_(self.gradient(index, self.step_number))
        of_tensor = {
            id(old): new for old, new in zip(self._grads[1 - self.step_number % 2], grads, strict=True)
        }
        for member in self.members:
            member.param.grad = of_tensor.get(id(member.param.grad), member.param.grad)
        control = control or Control([1.0, 0.125], None)
        for bucket in self.buckets:
            assert bucket.collect(), "the plan no longer describes its tensors"
            bucket.prepare(self.hypers, control)
            bucket.commit()
            if bucket.launched:
                bucket.driver.step(bucket)
            bucket.release()

    def gradient(self, index: int, step: int) -> Tensor:
        """What a tensor's gradient holds in a step."""
        blocks = any(codec.block > 1 for codec in self.case.states)
        values = tame if blocks and index % 5 != 2 else wild
        return values(self._sizes[index][0], DTYPES[self.case.grad.name], self._seed + index, step)

    def bucket(self) -> Bucket:
        """The bucket of all tensors that are not empty."""
        (bucket,) = (bucket for bucket in self.buckets if bucket.launched)
        return bucket

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, states and step counts."""
        for index, member in enumerate(self.members):
            name = f"{self.case.id}, tensor {index} of {member.param.numel()} elements"
            yield f"{name}: parameter", _local(member.param)
            for key, value in member.state.items():
                yield f"{name}: {key}", value

    def snapshot(self) -> list[Tensor]:
        """A copy of everything that a step may change."""
        return [value.clone() for _, value in self.named()]

    def assert_intact(self) -> None:
        """Fails if a gradient or a byte between the tensors has changed."""
        self.arena.assert_guards()
        for step in {self.step_number, max(1, self.step_number - 1)}:
            for index, grad in enumerate(self._grads[step % 2]):
                assert_same_bits(grad, self.gradient(index, step), f"gradient {index}")


def assert_equal_beds(actual: Bed, expected: Bed) -> None:
    """Fails at the first parameter, state or step count whose bits differ."""
    for (name, a), (_, b) in zip(actual.named(), expected.named(), strict=True):
        assert_same_bits(a, b, name)
