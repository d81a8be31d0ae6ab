"""How a tensor's elements lie in memory: flat runs, strided layouts, overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_DIMS = 8
LAYOUT_LENGTH = 1 + 3 * MAX_DIMS


class Layout(NamedTuple):
    """Dimensions from outermost to innermost in memory, with strides in elements."""

    sizes: tuple[int, ...]
    param_strides: tuple[int, ...]
    grad_strides: tuple[int, ...]

    @property
    def flat(self) -> bool:
        """Whether element i of every plane sits at offset i."""
        return not self.sizes or (self.param_strides == self.grad_strides == (1,))

    def record(self) -> list[int]:
        """The row of the layouts table: ``[ndim, sizes[8], param strides[8], grad strides[8]]``."""
        missing = MAX_DIMS - len(self.sizes)
        padded = (self.sizes + (1,) * missing, self.param_strides + (0,) * missing)
        return [len(self.sizes), *padded[0], *padded[1], *self.grad_strides, *(0,) * missing]


def _memory_order(tensor: Tensor) -> list[int]:
    """Dimensions of more than one element, largest stride first."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size != 1]
    return sorted(dims, key=tensor.stride, reverse=True)


def layout_of(param: Tensor, grad: Tensor) -> Layout:
    """Merges every pair of dimensions that parameter and gradient both walk without a gap."""
    sizes: list[int] = []
    strides: list[tuple[int, int]] = []
    for dim in _memory_order(param):
        size, stride = param.shape[dim], (param.stride(dim), grad.stride(dim))
        if sizes and strides[-1] == (stride[0] * size, stride[1] * size):
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return Layout(tuple(sizes), tuple(s[0] for s in strides), tuple(s[1] for s in strides))


def follows(state: Tensor, param: Tensor) -> bool:
    """Whether a state is dense and runs through memory in the parameter's order."""
    if state.shape != param.shape:
        return False
    if state.numel() == 0:
        return True
    expected = 1
    for dim in reversed(_memory_order(param)):
        if state.stride(dim) != expected:
            return False
        expected *= state.shape[dim]
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory (expanded tensors, sliding windows).

    >>> overlaps_itself(torch.zeros(3).expand(2, 3)), overlaps_itself(torch.zeros(4, 6)[:, ::2].t())
    (True, False)
    """
    extent = 1
    for dim in reversed(_memory_order(tensor)):
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
    marks = torch.zeros(max(_span(a)[1], _span(b)[1]) - start, dtype=torch.bool)

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
