"""A contender at work: its own parameters and states, checked and then timed."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_optim.kernels.codecs import CODECS, OF_DTYPE, for_slot
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.spec import bytes_moved

from .cases import Case
from .peers import Contender, MissingPeerError
from .timing import Copy, InPlace, Sweep, Timed, interleave, nbytes
from .verify import Sampler, change_in_float64, relative_error

CHECKED_STEPS = 3


class Gradients:
    """Two sets of values for every dtype, shared by all contenders of a case."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self._shapes, self._device = shapes, device
        self._sets: dict[torch.dtype, list[list[Tensor]]] = {}

    def values(self, dtype: torch.dtype, step: int) -> list[Tensor]:
        if dtype not in self._sets:
            generator = torch.Generator(self._device).manual_seed(1)
            kind: dict[str, Any] = {"device": self._device, "dtype": dtype, "generator": generator}
            self._sets[dtype] = [[torch.randn(shape, **kind) for shape in self._shapes] for _ in range(2)]
        return self._sets[dtype][step % 2]


class Run(Timed):
    """Steps of one contender. ``prepare`` gives every parameter its gradient, as backward does."""

    def __init__(
        self,
        contender: Contender,
        shapes: Sequence[tuple[int, ...]],
        gradients: Gradients,
        device: torch.device,
        kept: bool,
    ) -> None:
        super().__init__(contender.label, device)
        self.contender, self._gradients, self._kept = contender, gradients, kept
        self.dtype = getattr(torch, CODECS[contender.param].planes[0].dtype)
        generator = torch.Generator(device).manual_seed(0)
        kind: dict[str, Any] = {"device": device, "dtype": self.dtype, "generator": generator}
        self.params = [Parameter(torch.randn(shape, **kind).mul_(0.1)) for shape in shapes]
        self.elements = sum(param.numel() for param in self.params)
        self.optimizer = contender.make(self.params)
        self._steps = 0
        self.failure = ""

    def prepare(self) -> None:
        values = self._gradients.values(self.dtype, 0 if self._kept else self._steps)
        if not self._kept:
            # Autograd clones them into memory of its own: new objects, unknown to Python, new addresses.
            torch.autograd.backward(self.params, values)
        elif self._steps == 0:
            for param, value in zip(self.params, values, strict=True):
                param.grad = value
        self._steps += 1

    def call(self) -> None:
        self.optimizer.step()

    def finish(self) -> None:
        if not self._kept:
            self.optimizer.zero_grad()

    def sample(self, round_: int, sweep: Callable[[], None] | None) -> None:
        """One that fails, for want of memory say, gives back what it holds and sits out from then on."""
        if not self.failure:
            self._try(lambda: super(Run, self).sample(round_, sweep))

    def warm_up(self) -> None:
        if not self.failure:
            self._try(super().warm_up)

    def _try(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as failure:
            self.failure = _reason(failure)
        if self.failure:
            # Here the exception is gone, and with its traceback all that the step was about to do.
            del self.optimizer, self.params
            free()

    def check(self, sampler: Sampler) -> float:
        """Takes the first steps; the relative error of the change they make."""
        start = sampler(self.params)
        grads = []
        for _ in range(CHECKED_STEPS):
            self.prepare()
            grads.append(sampler([param.grad for param in self.params if param.grad is not None]))
            self.call()
            self.finish()
        expected = change_in_float64(self.contender.rule, self.contender.hyper(), start, grads)
        return relative_error(sampler(self.params) - start, expected)

    def state_bytes(self) -> float:
        """Bytes per parameter that the states hold, counts of steps apart."""
        values = [
            value
            for state in self.optimizer.state.values()
            for key, kept in state.items()
            for value in _leaves(kept)
            if key != "step" and not (isinstance(value, Tensor) and value.ndim == 0)
        ]
        return sum({id(value): nbytes(value) for value in values}.values()) / self.elements

    def bytes_per_parameter(self) -> float:
        """What a one-pass step must move: the codec model for ours, the same count for a peer's tensors."""
        c = self.contender
        if c.is_ours:
            rule, param = RULES[c.rule], CODECS[c.param]
            states = tuple(for_slot(c.states, slot.signed) for slot in rule.slots)
            return sum(bytes_moved(rule, param, CODECS[OF_DTYPE[param.planes[0].dtype]], states))
        return 3 * self.dtype.itemsize + 2 * self.state_bytes()

    def driver(self) -> str | None:
        """The backend and arithmetic that ran our step."""
        plan = getattr(self.optimizer, "_plan", None)
        if plan is None:
            return None
        return ", ".join(sorted({f"{b.driver.name} {'exact' if b.exact else 'fast'}" for b in plan.buckets}))


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"[:300]


def _leaves(value: Any) -> Iterator[Any]:
    """What containers within containers hold."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        yield value
        return
    for part in value:
        yield from _leaves(part)


@dataclass
class Row:
    """A contender's outcome: timed, or the reason why not."""

    contender: Contender
    status: str = "ok"
    reason: str = ""
    run: Run | None = None
    error: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """A case after it was measured."""

    case: Case
    shapes: Sequence[tuple[int, ...]]
    rows: list[Row]
    copy: Copy
    in_place: InPlace
    rounds: int


def _admit(
    contender: Contender,
    shapes: Any,
    gradients: Gradients,
    sampler: Sampler,
    case: Case,
    device: torch.device,
) -> Row:
    """A contender whose first steps are right, or the reason to leave it out."""
    row = Row(contender)
    try:
        run = Run(contender, shapes, gradients, device, case.grads == "kept")
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row.error = run.check(sampler)
    except MissingPeerError as missing:
        return Row(contender, "missing", str(missing))
    except Exception as failure:
        # A peer may fail in any way; the table says so and the others are timed.
        return Row(contender, "failed", _reason(failure))
    row.facts = {
        "first_steps_s": round(time.perf_counter() - begin, 3),
        "state_bytes_per_parameter": round(run.state_bytes(), 4),
        "bytes_per_parameter": round(run.bytes_per_parameter(), 4),
        "driver": run.driver(),
    }
    if not row.error <= contender.allowed_error:
        allowed = contender.allowed_error
        return Row(
            contender,
            "wrong",
            f"relative error {row.error:.1e} after {CHECKED_STEPS} steps, allowed {allowed:.0e}",
        )
    row.run = run
    return row


def _ceilings(device: torch.device, size: int) -> tuple[Copy, InPlace]:
    """What steps are compared with, of as many bytes as there is room for."""
    while True:
        try:
            return Copy(device, size), InPlace(device, size)
        except torch.OutOfMemoryError:
            if size < 2**22:
                raise
            size //= 2


def _admitted(case: Case, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Iterator[Row]:
    gradients, sampler = Gradients(shapes, device), Sampler(shapes, device)
    for contender in case.contenders:
        row = _admit(contender, shapes, gradients, sampler, case, device)
        if row.status in ("failed", "wrong"):
            free()
        yield row


def _drop_failed(rows: Sequence[Row]) -> list[Run]:
    """Those that still run; the others become rows with the reason."""
    for row in rows:
        if row.run is not None and row.run.failure:
            row.status, row.reason, row.run = "failed", row.run.failure, None
    return [row.run for row in rows if row.run is not None]


def measure(
    case: Case,
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    rounds: int,
    budget_s: float,
    ceiling: int,
) -> Outcome:
    """Checks every contender, then times them in turn beside a copy of ``ceiling`` bytes."""
    # First, while the device is empty: contenders may fill it, and one that does not fit is a row.
    copy, in_place = _ceilings(device, ceiling)
    sweep = Sweep(device) if case.cold else None
    rows = list(_admitted(case, shapes, device))
    for item in [copy, in_place, *_drop_failed(rows)]:
        item.sample(-1, None)
        for samples in (item.time, item.host, item.wall):
            samples.by_round.clear()
        item.spent_s = 0.0
    timed = _drop_failed(rows)
    if case.cold:
        interleave([copy, in_place, *timed], rounds, budget_s, sweep)
    else:
        # Taken in turn with them, copies would empty the caches.
        share = budget_s / (2 + len(timed))
        interleave([copy, in_place], rounds, 2 * share, None)
        interleave(timed, rounds, len(timed) * share, None, warm=True)
    _drop_failed(rows)
    return Outcome(case, shapes, rows, copy, in_place, len(copy.time.by_round))


def free() -> None:
    """Gives memory that nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
