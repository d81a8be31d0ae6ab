"""What a driver is given: tensors at fixed addresses that one launch updates, and their rows of scalars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import lookup
from .layout import LAYOUT_LENGTH, Layout
from .spec import Codec, Rule
from .staging import Staging

if TYPE_CHECKING:
    from .finders import Finder
    from .matrix import MatrixCut

NUMEL, ROW, ALIGNED, LAYOUT, ORDINAL, DRAWN, HEADER = range(7)
"""Columns of ``Launch.table``, then addresses of each codec's planes and lookup table, gradient last."""

SEED, STEP = 2, 3
"""Words of a row that are integers."""

# An array: numpy converts a Python number anew in every call.
_LOW_BITS = np.array(15)


def addresses_of(tensors: Sequence[Tensor]) -> np.ndarray:
    """Where the memory of each tensor begins."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


class Driver(NamedTuple):
    """A backend: how a launch's step and its gradients' sum of squares are computed.

    ``by_table`` says whether it finds elements by the launch's table of layouts, with its ``MAX_DIMS``.
    """

    name: str
    step: Callable[[Launch], None]
    square_sum: Callable[[Launch], Tensor]
    by_table: bool = True


class Key(NamedTuple):
    """What tensors must share to be updated by one launch.

    ``spread`` says which other ranks hold parts of them: a mesh and some of its dimensions.
    """

    device: torch.device
    rule: Rule
    param: Codec
    grad: Codec
    states: tuple[Codec, ...]
    driver: Driver
    exact: bool
    cut: MatrixCut | None = None
    adjusts_gradients: bool = False
    finder: Finder | None = None
    spread: tuple[Any, tuple[int, ...]] | None = None


class Operands(NamedTuple):
    """One parameter's tensors: the planes of what a launch writes in its place, and those of its states.

    ``layout`` says how the first plane and the gradient lie; ``ordinal`` is the parameter's index among all
    of the optimizer; ``drawn`` is how many counters of random bits belong to shards before this one.
    """

    param: list[Tensor]
    states: list[list[Tensor]]
    layout: Layout
    ordinal: int
    drawn: int = 0


class Launch:
    """Tensors of one rule and storage with their table of addresses; ``grads`` only during a step."""

    table: Tensor
    rows: Tensor
    host_rows: np.ndarray

    def __init__(self, key: Key, operands: Sequence[Operands], strided: bool) -> None:
        self.rule, self.param, self.grad, self.states = key.rule, key.param, key.grad, key.states
        self.device, self.driver, self.exact, self.strided = key.device, key.driver, key.exact, strided
        self.cache: dict[Any, Any] = {}
        self.param_planes = [o.param for o in operands]
        self.state_planes = [o.states for o in operands]
        self.params = [planes[0] for planes in self.param_planes]
        self.ordinals, self.drawn = [o.ordinal for o in operands], [o.drawn for o in operands]
        self.numels = [p.numel() for p in self.params]
        self.random = any(codec.random for codec in (key.param, *key.states))
        self.grads: list[Tensor] = []
        self.grad_addresses = b""
        self.layouts: Tensor | None = None
        self._layouts = [o.layout for o in operands]

    def allocate(self, row_indices: Sequence[int], row_count: int) -> None:
        """Makes the table and room for ``row_count`` rows; ``row_indices`` names that of each tensor."""
        self.row_indices = row_indices
        n, addresses = len(self.params), self._addresses()
        columns = HEADER + len(addresses[0]) + 1
        row_dtype = torch.float64 if self.param.compute == "float64" else torch.float32
        row_words = -(-row_count * self.rule.row_length * row_dtype.itemsize // 8)
        # On the host, whatever torch.set_default_device says.
        memory = torch.zeros(columns * n + row_words, dtype=torch.int64, device="cpu")
        table = memory[: columns * n].view(columns, n)
        words = table.numpy()
        words[NUMEL], words[ROW] = self.numels, row_indices
        words[ORDINAL], words[DRAWN] = self.ordinals, self.drawn
        words[HEADER:-1] = np.array(addresses, np.int64).T
        self._fixed_aligned = np.bitwise_or.reduce(words[HEADER:-1], axis=0) % 16 == 0
        self._low_bits = b""
        if self.strided and self.driver.by_table:
            words[LAYOUT] = np.arange(n)
            records = [layout.record() for layout in self._layouts]
            records = torch.tensor(records, dtype=torch.int64, device="cpu")
            assert records.shape == (n, LAYOUT_LENGTH)
            self.layouts = records.to(self.device)
        self.staging = Staging(memory, columns, n, self.device)
        self.table = self.staging.device_memory[: columns * n].view(columns, n)
        rows = self.staging.device_memory[columns * n :].view(row_dtype)
        shape = (row_count, self.rule.row_length)
        self.rows = rows[: shape[0] * shape[1]].view(shape)
        host_rows = memory[columns * n :].numpy().view(str(row_dtype).removeprefix("torch."))
        self.host_rows = host_rows[: shape[0] * shape[1]].reshape(shape)

    def _addresses(self) -> list[list[int]]:
        """Of each tensor: every codec's planes and lookup table, without the gradient."""
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
            counts = torch.tensor([-(-numel // size) for numel in self.numels], device="cpu")
            tensor = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
            first = torch.cumsum(counts, 0) - counts
            tile = torch.arange(len(tensor), device="cpu") - first[tensor]
            pairs = torch.stack([tensor, tile], 1).to(torch.int32)
            self.cache["tiles", size] = pairs.to(self.device)
        return self.cache["tiles", size]

    def set_gradients(self, grads: list[Tensor], addresses: np.ndarray) -> None:
        """Writes where the gradients are, and who starts on a 16-byte boundary if that has changed."""
        self.grads = grads
        found = addresses.tobytes()
        if found == self.grad_addresses:
            return
        self.grad_addresses, table = found, self.staging.host_table
        table[-1] = addresses
        low_bits = (addresses & _LOW_BITS).tobytes()
        if low_bits != self._low_bits:
            np.copyto(table[ALIGNED], self._fixed_aligned & (addresses % 16 == 0))
            self._low_bits = low_bits
