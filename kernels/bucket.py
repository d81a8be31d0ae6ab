"""A bucket: parameters that are updated together, described once and checked in every step.

``Bucket.collect`` reads the step's gradients and says whether the description still holds; only then is
anything launched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import rows as row_tools
from .aliasing import Occupied, Written, extent
from .control import Control
from .launch import SEED, STEP, Key, Launch, Operands
from .layout import Layout, layout_of
from .readers import Reader
from .spec import Hyper


@dataclass
class Member:
    """One parameter in a plan: ``param`` as the user holds it, ``state`` its dictionary.

    ``ordinal`` is its index among all parameters of the optimizer; ``drawn`` is where its random bits begin.
    """

    key: Key
    group: int
    param: Tensor
    state: dict[str, Any]
    local: Callable[[Tensor], Tensor]
    ordinal: int = 0
    drawn: int = 0
    numel: int = field(init=False)
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        assert self.param.grad is not None
        param = self.local(self.param)
        self.numel, self.layout = param.numel(), layout_of(param, self.local(self.param.grad))

    def operands(self, names: Sequence[Sequence[str]]) -> Operands:
        """The planes of the parameter, the parameter itself being the first, and those of each slot."""
        param, *states = ([self.local(self.state[name]) for name in some] for some in names)
        return Operands([self.local(self.param), *param], states, self.layout, self.ordinal, self.drawn)


def operands_of(members: Sequence[Member]) -> list[Operands]:
    """The planes of all members, which share a key."""
    names = plane_names(members[0].key)
    return [member.operands(names) for member in members]


def plane_names(key: Key) -> list[list[str]]:
    """Keys of the state under which the planes beside the parameter itself are, and those of each slot."""
    owners = ["param", *(slot.name for slot in key.rule.slots)]
    codecs = [key.param.planes[1:], *(codec.planes for codec in key.states)]
    return [[owner + plane.suffix for plane in planes] for owner, planes in zip(owners, codecs, strict=True)]


def _adopt_steps(members: Sequence[Member], device: torch.device) -> Tensor:
    """One vector of step counts; each parameter's ``step`` becomes a view of its element."""
    steps = torch.stack([m.state["step"].to(device, torch.float32, non_blocking=True) for m in members])
    for member, step in zip(members, steps.unbind(), strict=True):
        member.state["step"] = step
    return steps


class Bucket(Launch):
    """The launch that updates some parameters, their gradients, step counts and rows of scalars."""

    def __init__(
        self,
        key: Key,
        members: list[Member],
        strided: bool,
        steps_on_device: bool,
        operands: Sequence[Operands] = (),
        further: Sequence[Launch] = (),
    ) -> None:
        """``operands`` and ``further`` launches of the same parameters where a step is not one launch."""
        own = operands_of(members)
        super().__init__(key, operands or own, strided)
        self.members, self._further, self.spread = members, further, key.spread
        self._local = members[0].local
        self.owners = [m.param for m in members]
        self.own_planes = [o.param for o in own]
        self._own_states = [o.states for o in own]
        self._locals = [o.param[0] for o in own]
        self.launched = self.numels[0] > 0
        self.steps_on_device = steps_on_device
        self.steps = _adopt_steps(members, key.device if self.steps_on_device else torch.device("cpu"))
        self._host_steps = None if self.steps_on_device else self.steps.numpy()
        self._remember()
        self._assign_rows()
        if self.launched:
            for launch in self.launches():
                launch.allocate(self.row_indices, self.row_count)

    def launches(self) -> tuple[Launch, ...]:
        """All launches of a step, the one that reads the gradients first."""
        return (self, *self._further)

    def rows_of(self, hyper: Hyper, step: Any, g_scale: Any) -> list[tuple[Any, ...]]:
        """For each launch ``g_scale`` and the rule's scalars."""
        return [row_tools.row(self.rule, hyper, step, g_scale)]

    def run(self) -> None:
        """Updates the parameters and states."""
        self.step(self)

    def step(self, launch: Launch) -> None:
        """One launch of the step, unless this rank has no element of it."""
        if self.launched:
            self.driver.step(launch)

    def _remember(self) -> None:
        """Keeps what ``collect`` compares a later step with."""
        self._reader = Reader(self.owners, self._local)
        grads = [self._local(p.grad) for p in self.owners if p.grad is not None]
        self._grad_extents = np.array([extent(g) for g in grads])
        # Where the gradients were when they were last seen to lie apart from what the step writes.
        self._harmless: bytes | None = None
        # Code that exchanges memory under a state (``state.data = other``) does so for all of them, to move
        # an optimizer elsewhere, so two members tell: to ask all of 300 took 80 us in every step. An
        # exchange of one in between goes unnoticed (README, limits).
        ends, names = (self.members[0], self.members[-1]), plane_names(self.members[0].key)
        self._state_samples = [member.state[name] for member in ends for name in chain(*names)]
        self._sampled_addresses = self._sample_states()

    def _sample_states(self) -> list[int]:
        samples = self._state_samples if self._reader.plain else map(self._local, self._state_samples)
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

    def collect(self) -> bool:
        """Reads this step's gradients; False if the plan no longer describes the tensors."""
        found = self._reader.read()
        if found is None:
            return False
        try:
            same = self._sample_states() == self._sampled_addresses
        except RuntimeError:
            # A tensor whose memory is gone: planning anew says which.
            return False
        if not same or not self._counts_as_expected():
            return False
        if self.launched:
            self.set_gradients(*found)
        return True

    def _counts_as_expected(self) -> bool:
        """Whether nobody else has set a step count; only the host's decide about rows."""
        steps = self._host_steps
        return steps is None or steps.tobytes() == self._expected_steps

    def written(self) -> Iterator[Written]:
        """Every tensor that a step of this bucket changes."""
        for owner, (param, *rest), states in zip(self.owners, self.own_planes, self._own_states, strict=True):
            yield Written(param, owner, True)
            yield from (Written(plane, owner, False) for plane in chain(rest, *states))

    def find_aliased(self, occupied: Occupied) -> int | None:
        """Index of a member whose gradient lies in memory that the step writes, if any does."""
        if not self.launched or self._harmless is self.grad_addresses:
            return None
        found = None
        if occupied.may_hold(self.staging.host_table[-1], self._grad_extents):
            found = occupied.find(self.grads, self.owners)
        if found is None:
            self._harmless = self.grad_addresses
        return found

    def prepare(self, groups: Sequence[Hyper], control: Control) -> None:
        """Computes the scalars of the coming step; changes nothing that a step or a user reads."""
        self._control, self._prepared = control, []
        if not self.launched:
            return
        if self.steps_on_device:
            steps = self.steps + (1.0 if control.active is None else control.active)
            for group, part in self._group_parts():
                hyper = row_tools.resolve(groups[group], self.device)
                values = self.rows_of(hyper, steps[part].double(), control.g_scales[group])
                self._prepared.append((part, values, hyper["seed"]))
            return
        for row, (group, step) in enumerate(self.cohorts):
            hyper, g_scale = row_tools.resolve(groups[group]), control.g_scales[group]
            # A factor that only the device knows is multiplied in there.
            values = self.rows_of(hyper, step + 1.0, 1.0 if isinstance(g_scale, Tensor) else g_scale)
            for launch, scalars in zip(self.launches(), values, strict=True):
                launch.host_rows[row] = row_tools.host_row(scalars)
                if launch.random:
                    launch.host_rows.view(np.uint32)[row, [SEED, STEP]] = hyper["seed"], int(step + 1) % 2**32

    def commit(self) -> None:
        """Advances the step counts and sends scalars and gradients' addresses to the device."""
        active = self._control.active
        if self._host_steps is None:
            self.steps.add_(1.0 if active is None or active is True else active)
        else:
            self._host_steps += 1.0
        for index, launch in enumerate(self.launches() if self.launched else ()):
            launch.staging.send(with_rows=not self.steps_on_device)
            for part, values, seed in self._prepared:
                row_tools.write(launch.rows[part], values[index], active)
                if launch.random:
                    words = launch.rows[part].view(torch.int32)
                    words[:, SEED], words[:, STEP] = seed - (seed >> 31 << 32), self.steps[part].int()
        if self._host_steps is None:
            return
        self._expected_steps = self._host_steps.tobytes()
        self.cohorts = [(group, step + 1.0) for group, step in self.cohorts]
        for row, (group, _) in enumerate(self.cohorts):
            if self.launched and isinstance(self._control.g_scales[group], Tensor):
                self.rows[row, 1].mul_(self._control.g_scales[group])

    def _group_parts(self) -> Iterator[tuple[int, slice]]:
        """The members of each group, which stand side by side."""
        counts = Counter(m.group for m in self.members)
        stop = 0
        for group, count in counts.items():
            stop += count
            yield group, slice(stop - count, stop)

    def per_member(self, values: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Of each member what ``rows_of`` was called for: numbers of its row, or entries of its group's."""
        if not self.steps_on_device:
            return [values[row] for row in self.row_indices]
        return [
            tuple(v[i] if isinstance(v, Tensor) and v.ndim else v for v in each)
            for each, (_, part) in zip(values, self._group_parts(), strict=True)
            for i in range(part.stop - part.start)
        ]

    def release(self) -> None:
        """Lets go of the gradients, so that ``zero_grad`` frees their memory."""
        self.grads = []
