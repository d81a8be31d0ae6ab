"""The kernels that find masks of whole tensors, for ``python -m bench static``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fused_optim.kernels.codecs import CODECS

from .machine_code import Access

SEARCHES = {"nm_mask": (2, 4, 8, 16, 32), "transposable_mask": (None,)}
"""What can be searched, by the size of its groups."""

_TYPES = {"out": "*u8", "n": "i64", "kept": "i32", "columns": "i32", "strips": "i32"}


class Search(NamedTuple):
    """A kernel as its launch specialises it; elements of a thread, and neighbours that it reads at once."""

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: Sequence[str]
    warps: int
    elements: int
    vector: int


def search(name: str, codec: str, group: int | None) -> Search:
    """The kernel for a large aligned tensor of that codec's dtype."""
    from fused_optim.kernels.triton import codecs, masks

    decode, width = getattr(codecs, f"{codec}_decode"), int(CODECS[codec].bytes_per_value)
    threads, types = 32 * masks.WARPS, {"x": f"*{codec}", **_TYPES}
    constants: dict[str, Any]
    if name == "nm_mask":
        kernel, tile, vector = masks.groups_kernel, 1024, 16 // width
        constants = {"DECODE": decode, "GROUP": group, "TILE": tile, "SPREAD": (vector, masks.WARPS)}
    else:
        kernel, blocks, vector = masks.blocks_kernel, 128, 8
        constants, tile = {"DECODE": decode, "BLOCKS": blocks}, 16 * blocks
        types["out"] = "*i16"
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    aligned = [arg for arg in ("x", "out", "columns") if arg in signature]
    return Search(kernel, signature, constants, aligned, masks.WARPS, tile // threads, vector)


def model(codec: str) -> tuple[float, float]:
    """Bytes per weight that a search must read and write: the weights, and a bit for each."""
    return CODECS[codec].bytes_per_value, 1 / 8


def traffic(accesses: Sequence[Access], found: Search) -> tuple[float, float, tuple[int, ...]]:
    """Bytes read and written per element, and the widths; threads that share a byte write it once."""
    shared = max(1, 8 // found.vector)
    read = sum(access.bytes for access in accesses if not access.store)
    written = sum(access.bytes for access in accesses if access.store) / shared
    widths = tuple(sorted({access.bytes for access in accesses}))
    return read / found.elements, written / found.elements, widths
