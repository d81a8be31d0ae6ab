"""Rules cut in two by matrix products: moments, then whole matrices of updates, then the parameters.

A first launch writes every update ``u`` into a workspace instead of adding it to its parameter; matrices of
one shape are transformed together; a last launch moves the parameters. All three are the kernels of the
uncut rule: the first finds a ``blank`` parameter there and a learning rate of -1, so that ``0 - (-1 * u)``
is the update itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import rows as row_tools
from .bucket import Bucket, Member, operands_of
from .codecs import BLANK, CODECS
from .control import Control
from .exchange import Exchange
from .late_masks import LateMasks, MaskedWeights
from .launch import Key, Launch, Operands, addresses_of
from .layout import layout_of, walked
from .masking import keeps_dense, masked
from .planes import read
from .rules import RULES
from .spec import Hyper, Per, Rule

FP32 = CODECS["fp32"]
MOVE = RULES["sgd"]
"""Subtracts a multiple of what it is given; with -1 it copies gradients to a blank place."""


class MatrixCut(Protocol):
    """What happens to whole matrices in the middle of a step; compares equal if it does the same."""

    @property
    def shared(self) -> tuple[tuple[str, Per], ...]:
        """States of whole rows or matrices."""
        ...

    @property
    def workspace_bytes(self) -> int:
        """Memory that the matrices of one launch may take, with what the transformations need."""
        ...

    def bytes_per_element(self, param: Tensor) -> float:
        """What one element of a parameter's matrices takes of that."""
        ...

    def reads_gradients(self) -> bool:
        """Whether gradients are transformed as well."""
        ...

    def reads_params(self) -> bool:
        """Whether the update depends on the parameters, and includes learning rate and weight decay."""
        ...

    def scalars(self, hyper: Hyper, step: Any, decay: Any) -> tuple[Any, ...]:
        """What the transformations need of a group's options at a step: floats, or tensors on a device.

        ``decay`` is what decoupled weight decay takes from a parameter.
        """
        ...

    def matrices(self, batch: Tensor) -> Sequence[Tensor]:
        """``[parameters, *shape]`` as views ``[parameters, ..., m, n]`` of the matrices in it."""
        ...

    def gradient(self, g: Tensor, scalars: Sequence[Any]) -> Tensor:
        """What takes the place of gradients ``[matrices, m, n]``."""
        ...

    def update(self, u: Tensor, scalars: Sequence[Any], shared: Sequence[Tensor], p: Tensor | None) -> Tensor:
        """What takes the place of updates ``[matrices, m, n]``.

        ``shared`` are the rule's states of rows and matrices, to be changed in place; ``p`` the parameters
        if they are read.
        """
        ...


def dense_strides(param: Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in the order of the parameter's."""
    strides, reach = [0] * param.ndim, 1
    for dim in reversed(walked(param)):
        strides[dim], reach = reach, reach * param.shape[dim]
    return tuple(stride or 1 for stride in strides)


def _workspace(memory: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Room for a dense tensor in each parameter's order of dimensions: as a batch, and one by one."""
    shape, strides, numel = params[0].shape, dense_strides(params[0]), params[0].numel()
    batch = memory.as_strided((len(params), *shape), (numel, *strides))
    return batch, list(batch.unbind())


class MatrixBucket(Bucket):
    """Parameters of one shape whose updates are transformed as matrices between two launches.

    Where gradients are transformed too, or weight decay joins them, a launch more copies them into the
    workspace first.
    """

    def __init__(self, key: Key, members: list[Member], steps_on_device: bool, memory: Tensor) -> None:
        assert key.cut is not None
        self.cut, self.whole_rule = key.cut, key.rule.inner or key.rule
        self._adjusts = key.adjusts_gradients
        own = operands_of(members)
        params = [operands.param[0] for operands in own]
        self._batch, updates = _workspace(memory, params)
        grads = [member.local(member.param.grad) for member in members if member.param.grad is not None]
        count = len(self.whole_rule.slots)
        in_place_of_params = [
            Operands([u], operands.states[:count], layout_of(u, grad), operands.ordinal, operands.drawn)
            for u, operands, grad in zip(updates, own, grads, strict=True)
        ]
        further, whole = [], key
        key = key._replace(rule=self.whole_rule, param=BLANK, states=key.states[:count])
        first = key
        if self.cut.reads_gradients() or self._adjusts:
            further.append(_launch(key._replace(grad=FP32), in_place_of_params, updates))
            first = key._replace(rule=MOVE, states=())
            in_place_of_params = [operands._replace(states=[]) for operands in in_place_of_params]
        moved = [operands._replace(states=operands.states[count:]) for operands in own]
        further.append(_launch(_moving(whole), moved, updates))
        strided = any(not operands.layout.flat for operands in in_place_of_params)
        super().__init__(first, members, strided, steps_on_device, in_place_of_params, further)
        for launch in further if self.launched else ():
            launch.set_gradients(updates, addresses_of(updates))
        self._exchange = None if key.spread is None else Exchange(members[0].param, len(members))
        self._shared = [_adopt(members, name) for name, _ in self.whole_rule.shared]
        self._masked = [MaskedWeights(whole, operands) for operands in own if whole.rule.inner is not None]
        self._late = None if whole.finder is None else LateMasks(self._masked, whole.finder)

    def rows_of(self, hyper: Hyper, step: Any, g_scale: Any) -> list[tuple[Any, ...]]:
        """For each launch ``g_scale`` and the rule's scalars."""
        rule, scale = self.whole_rule, row_tools.row(self.whole_rule, hyper, step, g_scale)[0]
        moments = rule.row({**hyper, "lr": -1.0, "weight_decay": 0.0}, step)
        decay = self._decay(hyper, step)
        add = (1.0, 0.0, 1.0, 0.0) if self.cut.reads_params() else (1.0, 0.0, hyper["lr"], decay)
        if self._masked:
            *_, pruned_scale, kept = hyper["sparsity"].row(step)
            # What masks do to gradients has been done.
            add = (*add, 1.0, 0.0, pruned_scale, kept)
            add = add if self._late is None else self._late.row(add)
        if len(self.launches()) == 2:
            return [(scale, *moments), add]
        return [(scale, 0.0, -1.0, 0.0), (1.0, *moments), add]

    def _decay(self, hyper: Hyper, step: Any) -> Any:
        """What decoupled weight decay takes from a parameter."""
        if hyper.get("decoupled_weight_decay", False):
            return hyper["lr"] * hyper["weight_decay"]
        return self._scalar("decay", hyper, step)

    def _scalar(self, name: str, hyper: Hyper, step: Any) -> Any:
        """One of the rule's scalars, zero if it has none of that name."""
        rule = self.whole_rule
        return dict(zip(rule.scalars, rule.row(hyper, step), strict=True)).get(name, 0.0)

    def prepare(self, groups: Sequence[Hyper], control: Control) -> None:
        """Computes the scalars of the coming step, also those of the transformations."""
        if self._late is not None:
            self._late.forget()
        super().prepare(groups, control)
        if self.steps_on_device:
            steps = self.steps + (1.0 if control.active is None else control.active)
            parts = list(self._group_parts())
            sources = [(group, steps[part].double(), part.stop - part.start) for group, part in parts]
        else:
            counts = Counter(self.row_indices)
            sources = [(group, step + 1.0, counts[row]) for row, (group, step) in enumerate(self.cohorts)]
        values = []
        for group, step, _ in sources:
            hyper = row_tools.resolve(groups[group], self.device if self.steps_on_device else None)
            l2 = self._scalar("l2", hyper, step) if self._adjusts else 0.0
            masks = hyper["sparsity"].row(step)[:2] if self._masked else (1.0, 0.0)
            values.append((l2, *masks, *self.cut.scalars(hyper, step, self._decay(hyper, step))))
        lengths = [length for *_, length in sources]
        self._scalars = [self._per_member(column, lengths) for column in zip(*values, strict=True)]

    def _per_member(self, values: Sequence[Any], lengths: Sequence[int]) -> Any:
        """One number if all parameters have the same, else a vector of theirs."""
        if not any(isinstance(value, Tensor) for value in values) and len(set(values)) == 1:
            return values[0]
        if not self.steps_on_device:
            numbers = [values[row] for row in self.row_indices]
            return torch.tensor(numbers, dtype=torch.float32, device=self.device)
        # torch.full and not torch.tensor, which would copy from the host: not while a graph is captured.
        parts = [
            value.float().expand(length)
            if isinstance(value, Tensor)
            else torch.full((length,), value, dtype=torch.float32, device=self.device)
            for value, length in zip(values, lengths, strict=True)
        ]
        return torch.cat(parts)

    def run(self) -> None:
        """Moments, matrices, parameters."""
        self.step(self)
        *moments, add = self._further
        l2, pruned_grad, pruned_decay, *scalars = self._scalars
        if moments:
            if self.cut.reads_gradients():
                self._transform(lambda g, each, *_: self.cut.gradient(g, each), scalars)
            if self._adjusts and self.launched:
                self._adjust_gradients(l2, pruned_grad, pruned_decay)
            self.step(moments[0])
        params = self._values() if self.cut.reads_params() else None
        active = self._control.active
        before = [shared.clone() for shared in self._shared] if isinstance(active, Tensor) else []
        self._transform(self.cut.update, scalars, params)
        for shared, old in zip(self._shared, before, strict=False):
            shared.copy_(torch.where(active, shared, old))
        self.step(add)
        if self._late is not None and self.launched:
            self._late.renew(self, active)

    def _values(self) -> Tensor:
        """The weights as the workspace has their updates."""
        values = torch.empty_like(self._batch)
        for index, (planes, out) in enumerate(zip(self.own_planes, values, strict=True)):
            if self._masked:
                self._masked[index].values(out)
            else:
                read(self.members[0].key.param, planes, planes[0], out)
        return values

    def _adjust_gradients(self, *strengths: Any) -> None:
        """What masks and weight decay make of the gradients, which are in the workspace."""
        shape = (-1, *[1] * (self._batch.ndim - 1))
        l2, pruned_grad, pruned_decay = (s.view(shape) if isinstance(s, Tensor) else s for s in strengths)
        values = self._values()
        if self._masked:
            keep = torch.stack([weights.mask() for weights in self._masked])
            # Selected, not multiplied with zero: what does not count may be NaN or infinite.
            counted = torch.where(keep | (pruned_grad != 0), self._batch, 0.0)
            self._batch.copy_(torch.where(keep, counted, counted + pruned_decay * values))
        self._batch.add_(values.mul_(l2))

    def _transform(
        self, function: Callable[..., Tensor], scalars: Sequence[Any], params: Tensor | None = None
    ) -> None:
        """Calls ``function`` with all matrices of one shape and puts its result in their place."""
        batch, shared, ranks = self._batch, self._shared, self._exchange
        if ranks is not None:
            batch, shared = ranks.whole(batch), list(map(ranks.own, shared))
            scalars = [ranks.own(s) if isinstance(s, Tensor) and s.ndim else s for s in scalars]
            params = None if params is None else ranks.whole(params)
        if len(batch):
            self._transform_whole(function, scalars, batch, shared, params)
        if ranks is not None:
            self._batch.copy_(ranks.parts(batch))
            for state, own in zip(self._shared, shared, strict=True):
                state.copy_(ranks.all(own))

    def _transform_whole(
        self,
        function: Callable[..., Tensor],
        scalars: Sequence[Any],
        batch: Tensor,
        shared: Sequence[Tensor],
        params: Tensor | None,
    ) -> None:
        batches = [batch, *shared, *([] if params is None else [params])]
        for view, *others in zip(*map(self.cut.matrices, batches), strict=True):
            batch, *others = (tensor.flatten(0, -3) for tensor in (view, *others))
            repeats = len(batch) // len(view)
            each = [s.repeat_interleave(repeats) if isinstance(s, Tensor) else s for s in scalars]
            p = None if params is None else others.pop()
            for part in self._parts(batch):
                some = [s[part] if isinstance(s, Tensor) else s for s in each]
                u = batch[part]
                result = function(u, some, [other[part] for other in others], None if p is None else p[part])
                if result is not u:
                    u.copy_(result)
            if batch.data_ptr() != view.data_ptr():
                view.copy_(batch.view(view.shape))

    def _parts(self, batch: Tensor) -> list[slice]:
        """Matrices of one parameter that are worked on together, where all are too many."""
        each = max(batch[0].numel(), 1) * self.cut.bytes_per_element(self.members[0].param)
        size = max(1, int(self.cut.workspace_bytes // each))
        return [slice(start, start + size) for start in range(0, len(batch), size)]


def _adopt(members: Sequence[Member], name: str) -> Tensor:
    """One tensor for a state of all members; each member's own becomes a view of it."""
    together = torch.stack([member.state[name] for member in members])
    for member, own in zip(members, together.unbind(), strict=True):
        member.state[name] = own
    return together


def couples_l2(rule: Rule, hyper: Hyper) -> bool:
    """Whether a rule adds weight decay to the gradients of a group, whatever its strength."""
    if "l2" not in rule.scalars:
        return False
    row = rule.row({**row_tools.resolve(hyper), "weight_decay": 1.0}, 1.0)
    return row[rule.scalars.index("l2")] != 0


def _moving(key: Key) -> Key:
    """The launch that adds updates to weights, and masks them if the rule does."""
    rule, states = MOVE, key.states[len((key.rule.inner or key.rule).slots) :]
    if key.rule.inner is not None:
        rule = masked(MOVE, key.rule.group, keeps_dense(key.rule))
    return key._replace(rule=rule, grad=FP32, states=states)


def _launch(key: Key, operands: Sequence[Operands], grads: Sequence[Tensor]) -> Launch:
    """A launch whose gradients are the workspace's."""
    placed = [o._replace(layout=layout_of(o.param[0], grad)) for o, grad in zip(operands, grads, strict=True)]
    return Launch(key, placed, any(not o.layout.flat for o in placed))


def chunks(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Members of one key in groups of one shape and order of dimensions that fit the workspace together."""
    alike: dict[Any, list[Member]] = {}
    for member in members:
        param = member.local(member.param)
        # Ranks must agree: two shapes may have equal shards on one of them only.
        whole = tuple(member.param.shape), tuple(getattr(member.param, "placements", ()))
        alike.setdefault((whole, tuple(param.shape), dense_strides(param)), []).append(member)
    for group in alike.values():
        cut, spread = group[0].key.cut, group[0].key.spread
        assert cut is not None
        ranks = 1 if spread is None else math.prod(map(spread[0].size, spread[1]))
        numel = -(-group[0].param.numel() // ranks)
        each = max(1, numel) * cut.bytes_per_element(group[0].param)
        size = max(1, int(cut.workspace_bytes // each))
        yield from (group[start : start + size] for start in range(0, len(group), size))
