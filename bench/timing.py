"""Samples and how they are taken: cold caches, interleaved, device time apart from host time.

On a CPU a sample is the time of the call. On a GPU the device's time comes from events recorded while
earlier work keeps the device busy, so that it holds no launch gaps; a second call on an idle device
gives the host's time (the call returned) and the wall time (the device has finished).
"""

from __future__ import annotations

import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .machine import last_level_cache

_SPIN_CYCLES_PER_US = 2000
WARM_UPS = 3


@dataclass
class Samples:
    """Milliseconds by round; a contender that is too slow for its budget misses rounds."""

    by_round: dict[int, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.by_round.values())

    def summary(self) -> dict[str, float | int]:
        values = sorted(self.by_round.values())
        q1, median, q3 = quartiles(values)
        return {"min": values[0], "q1": q1, "median": median, "q3": q3, "n": len(values)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def ratio(ours: Samples, theirs: Samples) -> tuple[float, float, float]:
    """Ratio of the medians, and the quartiles of the ratios within rounds, over the rounds that both took.

    A machine changes its pace while it is measured: rounds that one of them sat out say nothing of the other.
    """
    rounds = ours.by_round.keys() & theirs.by_round.keys()
    ours, theirs = (Samples({r: samples.by_round[r] for r in rounds}) for samples in (ours, theirs))
    q1, _, q3 = quartiles([ours.by_round[r] / theirs.by_round[r] for r in rounds])
    return ours.median / theirs.median, q1, q3


class Sweep:
    """Pushes everything out of the last-level cache, leaving clean lines."""

    def __init__(self, device: torch.device, scale: float = 2.0) -> None:
        size = int(scale * last_level_cache(device)) // 4
        self._buffer = torch.ones(size, device=device)

    def __call__(self) -> None:
        self._buffer.sum()


class Timed(ABC):
    """Something that is timed in rounds: ``prepare`` outside of the clock, ``call`` inside."""

    def __init__(self, label: str, device: torch.device) -> None:
        self.label, self.device = label, device
        self.time, self.host, self.wall = Samples(), Samples(), Samples()
        self.spent_s = 0.0

    @abstractmethod
    def call(self) -> None: ...

    def prepare(self) -> None:  # noqa: B027
        """Makes what ``call`` needs."""

    def finish(self) -> None:  # noqa: B027
        """Frees what ``prepare`` made."""

    def sample(self, round_: int, sweep: Callable[[], None] | None) -> None:
        start = time.perf_counter()
        if self.device.type == "cuda":
            self._sample_host(round_, sweep)
            self._sample_device(round_, sweep)
        else:
            self._ready(sweep)
            begin = time.perf_counter_ns()
            self.call()
            self.time.by_round[round_] = (time.perf_counter_ns() - begin) / 1e6
        self.finish()
        self.spent_s += time.perf_counter() - start

    def warm_up(self) -> None:
        """Calls that do not count: the next one finds the caches as they leave them."""
        start = time.perf_counter()
        for _ in range(WARM_UPS):
            self.prepare()
            self.call()
            self.finish()
        self.spent_s += time.perf_counter() - start

    def _ready(self, sweep: Callable[[], None] | None) -> None:
        self.prepare()
        if sweep is not None:
            sweep()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _sample_host(self, round_: int, sweep: Callable[[], None] | None) -> None:
        self._ready(sweep)
        begin = time.perf_counter_ns()
        self.call()
        returned = time.perf_counter_ns()
        torch.cuda.synchronize(self.device)
        self.host.by_round[round_] = (returned - begin) / 1e6
        self.wall.by_round[round_] = (time.perf_counter_ns() - begin) / 1e6

    def _sample_device(self, round_: int, sweep: Callable[[], None] | None) -> None:
        self._ready(sweep)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device spins while the host enqueues the whole call, at most 20 ms.
        spin_us = min(2e3 * self.host.by_round[round_] + 100, 2e4)
        torch.cuda._sleep(int(spin_us * _SPIN_CYCLES_PER_US))
        start.record()
        self.call()
        stop.record()
        stop.synchronize()
        self.time.by_round[round_] = start.elapsed_time(stop)


class Call(Timed):
    """A function without arguments."""

    def __init__(self, label: str, device: torch.device, function: Callable[[], object]) -> None:
        super().__init__(label, device)
        self._function = function

    def call(self) -> None:
        self._function()


class Copy(Timed):
    """The ceiling: a plain copy, counted as bytes read plus bytes written."""

    def __init__(self, device: torch.device, size: int) -> None:
        super().__init__("copy", device)
        self._source = torch.ones(size // 4, device=device)
        self._target = torch.zeros_like(self._source)
        self.bytes = 2 * self._source.nbytes

    def call(self) -> None:
        self._target.copy_(self._source)


class InPlace(Timed):
    """Reads and writes one buffer, as a step does; on a CPU a copy also has to fetch its target."""

    def __init__(self, device: torch.device, size: int) -> None:
        super().__init__("in place", device)
        self._buffer = torch.ones(size // 4, device=device)
        self.bytes = 2 * self._buffer.nbytes

    def call(self) -> None:
        self._buffer.mul_(1.0)


def interleave(
    timed: Sequence[Timed],
    rounds: int,
    budget_s: float,
    sweep: Callable[[], None] | None,
    least: int = 3,
    warm: bool = False,
) -> None:
    """Takes a sample of each in turn, A B A B; one that has used up its share of the budget sits out.

    With ``warm`` each sample follows ``WARM_UPS`` calls of its own kind.
    """
    share = budget_s / max(len(timed), 1)
    enabled = gc.isenabled()
    gc.disable()
    # What there is already, torch's half a million objects, is not looked through in every round.
    gc.collect()
    gc.freeze()
    try:
        for round_ in range(rounds):
            for item in timed:
                if round_ < least or item.spent_s < share:
                    if warm:
                        item.warm_up()
                    item.sample(round_, sweep)
            gc.collect()
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def nbytes(value: Any) -> int:
    """Bytes of a tensor, looking through subclasses that keep several inside."""
    if not isinstance(value, Tensor):
        return 0
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None:
        return value.nbytes
    return sum(nbytes(getattr(value, name)) for name in flatten()[0])
