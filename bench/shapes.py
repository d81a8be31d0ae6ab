"""Sets of tensors to step over: ``8x4Mi``-like grids and the parameters of Llama models."""

from __future__ import annotations

import re
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Llama:
    """A Llama's sizes; the parameters come in the order of ``model.parameters()``."""

    hidden: int
    layers: int
    intermediate: int
    kv: int
    vocab: int
    tied: bool

    def shapes(self) -> list[Shape]:
        h, kv = self.hidden, self.kv
        attention = [(h, h), (kv, h), (kv, h), (h, h)]
        mlp = [(self.intermediate, h), (self.intermediate, h), (h, self.intermediate)]
        layer = [*attention, *mlp, (h,), (h,)]
        head = [] if self.tied else [(self.vocab, h)]
        return [(self.vocab, h), *layer * self.layers, (h,), *head]


MODELS = {
    "llama-125m": Llama(768, 12, 2048, 768, 50304, tied=True),
    "llama-1.1b": Llama(2048, 22, 5632, 256, 32000, tied=False),  # TinyLlama-1.1B
    "llama-3b": Llama(3072, 28, 8192, 1024, 128256, tied=True),  # Llama-3.2-3B
}
_GRID = re.compile(r"(\d+)x(\d+)(Ki|Mi|)")
_UNITS = {"": 1, "Ki": 1024, "Mi": 1024**2}


def parse(name: str) -> list[Shape]:
    """The shapes behind a name.

    Raises:
        ValueError: the name is neither a model nor a grid.

    >>> parse("2x4Ki")
    [(4096,), (4096,)]
    >>> len(parse("llama-1.1b"))
    201
    """
    if name in MODELS:
        return MODELS[name].shapes()
    match = _GRID.fullmatch(name)
    if match is None:
        known = ", ".join(MODELS)
        raise ValueError(
            f"unknown shapes {name!r}; use COUNTxSIZE such as 8x4Mi or 300x16, or one of {known}"
        )
    count, size, unit = match.groups()
    return [(int(size) * _UNITS[unit],)] * int(count)


def shrink(shapes: list[Shape], limit: int = 4096) -> list[Shape]:
    """As many tensors and dimensions with at most about ``limit`` elements each, for trial runs."""
    side = {1: limit, 2: int(limit**0.5)}
    return [tuple(min(size, side[len(shape)]) for size in shape) for shape in shapes]
