"""Which tensors share memory: parameters with themselves, with each other, gradients with what is updated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .layout import walked


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory (expanded tensors, sliding windows).

    >>> overlaps_itself(torch.zeros(3).expand(2, 3)), overlaps_itself(torch.zeros(4, 6)[:, ::2].t())
    (True, False)
    """
    extent = 1
    for dim in reversed(walked(tensor)):
        if tensor.stride(dim) < extent:
            return tensor.numel() > 0
        extent += (tensor.shape[dim] - 1) * tensor.stride(dim)
    return False


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte of a tensor."""
    start = tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans overlap have a byte in common, by marking the bytes of one."""
    start = min(_span(a)[0], _span(b)[0])
    marks = torch.zeros(max(_span(a)[1], _span(b)[1]) - start, dtype=torch.bool, device="cpu")

    def bytes_of(tensor: Tensor) -> Tensor:
        width = tensor.element_size()
        strides = [stride * width for stride in tensor.stride()]
        return marks.as_strided((*tensor.shape, width), (*strides, 1), tensor.data_ptr() - start)

    bytes_of(a).fill_(True)
    return bool(bytes_of(b).any())


def find_shared(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Indices of two tensors that share memory, if any do."""
    order = sorted((i for i, t in enumerate(tensors) if t.numel()), key=lambda i: _span(tensors[i])[0])
    open_spans: list[int] = []
    for i in order:
        start = _span(tensors[i])[0]
        open_spans = [j for j in open_spans if _span(tensors[j])[1] > start]
        for j in open_spans:
            if tensors[i].device == tensors[j].device and _share_elements(tensors[i], tensors[j]):
                return min(i, j), max(i, j)
        open_spans.append(i)
    return None


class Written(NamedTuple):
    """A tensor that a step writes: the memory of ``owner`` itself, or of its states."""

    tensor: Tensor
    owner: Tensor
    is_parameter: bool


class Occupied:
    """The memory that a step writes, for a quick look at where the gradients lie."""

    def __init__(self, written: Iterable[Written]) -> None:
        self._written = sorted((w for w in written if w.tensor.numel()), key=lambda w: w.tensor.data_ptr())
        spans = np.array([_span(w.tensor) for w in self._written], dtype=np.int64).reshape(-1, 2)
        # The furthest end so far: spans of interleaved views overlap.
        self._edges = np.maximum.accumulate(spans.reshape(-1))
        # Up to where memory is free: from an end to the next start, from a start not at all.
        self._free_until = np.append(self._edges, np.iinfo(np.int64).max)
        self._free_until[1::2] = 0

    def may_hold(self, addresses: np.ndarray, extents: np.ndarray) -> bool:
        """Whether bytes ``[address, address + extent)`` of any gradient lie within a span."""
        room = self._free_until[self._edges.searchsorted(addresses, "right")]
        room -= addresses
        # numpy's any() costs several times as much when its code is not in a cache.
        return 1 in (room < extents).tobytes()

    def find(self, grads: Sequence[Tensor], owners: Sequence[Tensor]) -> int | None:
        """Index of the first gradient that lies in memory which is written, if any does.

        A gradient that coincides with its own parameter is harmless: every element is read before it
        is written.
        """
        for index, (grad, owner) in enumerate(zip(grads, owners, strict=True)):
            start, stop = _span(grad)
            for tensor, written_owner, is_parameter in self._written:
                first, end = _span(tensor)
                if first >= stop or end <= start or tensor.device != grad.device:
                    continue
                same_place = (
                    first == start and tensor.stride() == grad.stride() and tensor.dtype == grad.dtype
                )
                if written_owner is owner and is_parameter and same_place:
                    continue
                if _share_elements(tensor, grad):
                    return index
        return None


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first to its last element."""
    start, stop = _span(tensor)
    return stop - start
