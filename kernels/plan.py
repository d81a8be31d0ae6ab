"""From parameters to launches: buckets with a table of addresses and a row of scalars each, cached.

A plan describes one set of tensors at fixed addresses. ``Bucket.collect`` reads the step's gradients
and says whether the description still holds; only then is anything launched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import lookup
from . import rows as row_tools
from .aliasing import Occupied, Written, extent
from .control import Control
from .guards import Guards
from .layout import LAYOUT_LENGTH, Layout, layout_of
from .spec import Codec, Hyper, Rule
from .staging import Staging

NUMEL, ROW, ALIGNED, LAYOUT, ORDINAL, HEADER = range(6)
"""Columns of ``Bucket.table``, then addresses of each codec's planes and lookup table, gradient last."""

SEED, STEP = 2, 3
"""Words of a row that are integers."""

# An array: numpy converts a Python number anew in every call.
_LOW_BITS = np.array(15)


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


class Driver(NamedTuple):
    """A backend: how a bucket's step and its gradients' sum of squares are computed."""

    name: str
    step: Callable[[Bucket], None]
    square_sum: Callable[[Bucket], Tensor]


class Key(NamedTuple):
    """What tensors must share to be updated by one launch."""

    device: torch.device
    rule: Rule
    param: Codec
    grad: Codec
    states: tuple[Codec, ...]
    driver: Driver
    exact: bool


@dataclass
class Member:
    """One parameter in a plan: ``param`` as the user holds it, ``state`` its dictionary.

    ``ordinal`` is its index among all parameters of the optimizer.
    """

    key: Key
    group: int
    param: Tensor
    state: dict[str, Any]
    local: Callable[[Tensor], Tensor]
    ordinal: int = 0
    numel: int = field(init=False)
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        assert self.param.grad is not None
        param = self.local(self.param)
        self.numel, self.layout = param.numel(), layout_of(param, self.local(self.param.grad))

    def planes(self) -> list[list[Tensor]]:
        """The planes of the parameter, the parameter itself being the first, then those of each slot."""
        homes = [[self.local(self.state[name]) for name in names] for names in self._names()]
        homes[0].insert(0, self.local(self.param))
        return homes

    def _names(self) -> list[list[str]]:
        owners = ["param", *(slot.name for slot in self.key.rule.slots)]
        codecs = [self.key.param.planes[1:], *(codec.planes for codec in self.key.states)]
        return [
            [owner + plane.suffix for plane in planes] for owner, planes in zip(owners, codecs, strict=True)
        ]

    def plane_names(self) -> tuple[str, ...]:
        """Keys of the state under which the planes are."""
        return tuple(chain.from_iterable(self._names()))


def _adopt_steps(members: Sequence[Member], device: torch.device) -> Tensor:
    """One vector of step counts; each parameter's ``step`` becomes a view of its element."""
    steps = torch.stack([m.state["step"].to(device, torch.float32, non_blocking=True) for m in members])
    for member, step in zip(members, steps.unbind(), strict=True):
        member.state["step"] = step
    return steps


class Bucket:
    """Tensors that one launch updates."""

    def __init__(self, key: Key, members: list[Member], strided: bool, steps_on_device: bool) -> None:
        self.rule, self.param, self.grad, self.states = key.rule, key.param, key.grad, key.states
        self.device, self.driver, self.exact, self.strided = key.device, key.driver, key.exact, strided
        self.members = members
        self.cache: dict[Any, Any] = {}
        local = self._local = members[0].local
        self.owners = [m.param for m in members]
        self.params = [local(p) for p in self.owners]
        planes = [m.planes() for m in members]
        self.param_planes = [param for param, *_ in planes]
        self.state_planes = [states for _, *states in planes]
        self.random = any(codec.random for codec in (key.param, *key.states))
        self.ordinals = [m.ordinal for m in members]
        self.grads: list[Tensor] = []
        self.numels = [p.numel() for p in self.params]
        self.launched = self.numels[0] > 0
        self.steps_on_device = steps_on_device
        self.steps = _adopt_steps(members, key.device if self.steps_on_device else torch.device("cpu"))
        self._host_steps = None if self.steps_on_device else self.steps.numpy()
        self._remember()
        if self.launched:
            self._assign_rows()
            self._allocate()

    def _remember(self) -> None:
        """Keeps what ``collect`` compares a later step with."""
        self._plain = all(type(p) in (Tensor, torch.nn.Parameter) and not p.is_complex() for p in self.owners)
        grads = [self._local(p.grad) for p in self.owners if p.grad is not None]
        self._guards = Guards([*(self.owners if self._plain else self.params), *grads])
        self._grad_extents = np.array([extent(g) for g in grads])
        self._param_addresses = _addresses(self.params).tobytes()
        # Code that exchanges memory under a state (``state.data = other``) does so for all of them, to move
        # an optimizer elsewhere, so two members tell: to ask all of 300 took 80 us in every step. Should one
        # alone be exchanged, ``state_planes`` keep its old memory alive, and the step goes on there.
        ends, names = (self.members[0], self.members[-1]), self.members[0].plane_names()
        self._state_samples = [member.state[name] for member in ends for name in names]
        self._sampled_addresses = self._sample_states()

    def _sample_states(self) -> list[int]:
        samples = self._state_samples if self._plain else map(self._local, self._state_samples)
        return [tensor.data_ptr() for tensor in samples]

    def _assign_rows(self) -> None:
        """One row per (group, step count) on the host, one per parameter on the device."""
        if self.steps_on_device:
            self.row_indices = list(range(len(self.members)))
            self.row_count = len(self.members)
            return
        assert self._host_steps is not None
        self._expected_steps = self._host_steps.tobytes()
        cohorts = [(m.group, step) for m, step in zip(self.members, self.steps.tolist(), strict=True)]
        self.cohorts = list(dict.fromkeys(cohorts))
        row_of = {cohort: row for row, cohort in enumerate(self.cohorts)}
        self.row_indices = [row_of[cohort] for cohort in cohorts]
        self.row_count = len(self.cohorts)

    def _allocate(self) -> None:
        n, addresses = len(self.members), self._addresses()
        columns = HEADER + len(addresses[0]) + 1
        row_dtype = torch.float64 if self.param.compute == "float64" else torch.float32
        row_words = -(-self.row_count * self.rule.row_length * row_dtype.itemsize // 8)
        memory = torch.zeros(columns * n + row_words, dtype=torch.int64)
        table = memory[: columns * n].view(columns, n)
        table[NUMEL] = torch.tensor(self.numels)
        table[ROW] = torch.tensor(self.row_indices)
        table[ORDINAL] = torch.tensor(self.ordinals)
        table[HEADER:-1] = torch.tensor(addresses, dtype=torch.int64).T
        self._fixed_aligned = np.bitwise_or.reduce(table[HEADER:-1].numpy(), axis=0) % 16 == 0
        self._low_bits = b""
        self.layouts = None
        if self.strided:
            table[LAYOUT] = torch.arange(n)
            records = torch.tensor([m.layout.record() for m in self.members], dtype=torch.int64)
            assert records.shape == (n, LAYOUT_LENGTH)
            self.layouts = records.to(self.device)
        self._staging = Staging(memory, columns, n, self.device)
        self.table = self._staging.device_memory[: columns * n].view(columns, n)
        rows = self._staging.device_memory[columns * n :].view(row_dtype)
        shape = (self.row_count, self.rule.row_length)
        self.rows = rows[: shape[0] * shape[1]].view(shape)
        self._host_rows = memory[columns * n :].numpy().view(str(row_dtype).removeprefix("torch."))
        self._host_rows = self._host_rows[: shape[0] * shape[1]].reshape(shape)

    def _addresses(self) -> list[list[int]]:
        """Of each member: every codec's planes and lookup table, without the gradient."""
        codecs = (self.param, *self.states)
        tables = [[lookup.table(c.lookup, self.device)] if c.lookup else [] for c in codecs]
        return [
            [t.data_ptr() for home, extra in zip([p, *s], tables, strict=True) for t in (*home, *extra)]
            for p, s in zip(self.param_planes, self.state_planes, strict=True)
        ]

    def random_key(self, row: int) -> tuple[int, int]:
        """Seed and step of a row (reads the device)."""
        if not self.random:
            return 0, 0
        seed, step = self.rows.view(torch.int32)[row, SEED : STEP + 1].tolist()
        return seed & 0xFFFFFFFF, step

    def tiles(self, size: int) -> Tensor:
        """``[n_tiles, 2]`` int32: (tensor, tile within it) for tiles of ``size`` elements."""
        if ("tiles", size) not in self.cache:
            counts = torch.tensor([-(-numel // size) for numel in self.numels])
            tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)
            first = torch.cumsum(counts, 0) - counts
            tile = torch.arange(len(tensor)) - first[tensor]
            pairs = torch.stack([tensor, tile], 1).to(torch.int32)
            self.cache["tiles", size] = pairs.to(self.device)
        return self.cache["tiles", size]

    def _current(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Parameters and gradients if they are what was planned; ``None`` also for a missing gradient."""
        params, grads = self.owners, [p.grad for p in self.owners]
        if self._plain and self._guards.check([*params, *grads]):
            return params, grads  # pyright: ignore[reportReturnType]
        if any(grad is None for grad in grads):
            return None
        params = params if self._plain else list(map(self._local, params))
        resolved = [self._local(grad) for grad in grads if grad is not None]
        return (params, resolved) if self._guards.check([*params, *resolved]) else None

    def collect(self) -> bool:
        """Reads this step's gradients; False if the plan no longer describes the tensors."""
        current = self._current()
        if current is None:
            return False
        params, grads = current
        try:
            same = _addresses(params).tobytes() == self._param_addresses
            same = same and self._sample_states() == self._sampled_addresses
        except RuntimeError:
            # A tensor whose memory is gone: planning anew says which.
            return False
        if not same or not self._counts_as_expected():
            return False
        self.grads = grads
        if self.launched:
            self._fill_table()
        return True

    def _counts_as_expected(self) -> bool:
        """Whether nobody else has set a step count; only the host's decide about rows."""
        steps = self._host_steps
        return steps is None or not self.launched or steps.tobytes() == self._expected_steps

    def _fill_table(self) -> None:
        """Writes where the gradients are, and who starts on a 16-byte boundary if that has changed."""
        table, addresses = self._staging.host_table, _addresses(self.grads)
        table[-1] = addresses
        low_bits = (addresses & _LOW_BITS).tobytes()
        if low_bits != self._low_bits:
            np.copyto(table[ALIGNED], self._fixed_aligned & (addresses % 16 == 0))
            self._low_bits = low_bits

    def written(self) -> Iterator[Written]:
        """Every tensor that a step of this bucket changes."""
        for owner, (param, *rest), states in zip(
            self.owners, self.param_planes, self.state_planes, strict=True
        ):
            yield Written(param, owner, True)
            yield from (Written(plane, owner, False) for plane in chain(rest, *states))

    def find_aliased(self, occupied: Occupied) -> int | None:
        """Index of a member whose gradient lies in memory that the step writes, if any does."""
        if not self.launched or not occupied.may_hold(self._staging.host_table[-1], self._grad_extents):
            return None
        return occupied.find(self.grads, self.owners)

    def prepare(self, groups: Sequence[Hyper], control: Control) -> None:
        """Computes the scalars of the coming step; changes nothing that a step or a user reads."""
        self._control, self._prepared = control, []
        if not self.launched:
            return
        if self.steps_on_device:
            steps = self.steps + (1.0 if control.active is None else control.active)
            for group, part in self._group_parts():
                hyper = row_tools.resolve(groups[group], self.device)
                g_scale = control.g_scales[group]
                values = row_tools.row(self.rule, hyper, steps[part].double(), g_scale)
                self._prepared.append((part, values, hyper["seed"] if self.random else 0))
            return
        for row, (group, step) in enumerate(self.cohorts):
            hyper = row_tools.resolve(groups[group])
            self._host_rows[row] = row_tools.host_row(self.rule, hyper, step + 1.0, control.g_scales[group])
            if self.random:
                self._host_rows.view(np.uint32)[row, [SEED, STEP]] = hyper["seed"], int(step) + 1

    def commit(self) -> None:
        """Advances the step counts and sends scalars and gradients' addresses to the device."""
        active = self._control.active
        if self._host_steps is None:
            self.steps.add_(1.0 if active is None or active is True else active)
        else:
            self._host_steps += 1.0
        if not self.launched:
            return
        self._staging.send(with_rows=not self.steps_on_device)
        if self.steps_on_device:
            for part, values, seed in self._prepared:
                row_tools.write(self.rows[part], values, active)
                if self.random:
                    words = self.rows[part].view(torch.int32)
                    words[:, SEED], words[:, STEP] = seed - (seed >> 31 << 32), self.steps[part].int()
            return
        assert self._host_steps is not None
        self._expected_steps = self._host_steps.tobytes()
        self.cohorts = [(group, step + 1.0) for group, step in self.cohorts]
        for row, (group, _) in enumerate(self.cohorts):
            if isinstance(self._control.g_scales[group], Tensor):
                self.rows[row, 1].mul_(self._control.g_scales[group])

    def _group_parts(self) -> Iterator[tuple[int, slice]]:
        """The members of each group, which stand side by side."""
        counts = Counter(m.group for m in self.members)
        stop = 0
        for group, count in counts.items():
            stop += count
            yield group, slice(stop - count, stop)

    def release(self) -> None:
        """Lets go of the gradients, so that ``zero_grad`` frees their memory."""
        self.grads = []


def build(members: Sequence[Member], steps_on_device: bool) -> list[Bucket]:
    """Sorts parameters into buckets; within one they keep the order of their groups.

    ``steps_on_device`` keeps the host from knowing step counts; on a CPU there is nothing to keep.
    """
    sorted_members: dict[Any, list[Member]] = {}
    for member in members:
        launched = member.numel > 0
        key = (member.key, launched, launched and not member.layout.flat)
        sorted_members.setdefault(key, []).append(member)
    return [
        Bucket(key, part, strided, steps_on_device and key.device.type != "cpu")
        for (key, _, strided), part in sorted_members.items()
    ]
