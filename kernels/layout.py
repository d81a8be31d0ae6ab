"""How a tensor's elements lie in memory: flat runs, strided layouts, overlaps."""

from __future__ import annotations

from typing import NamedTuple

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


def memory_order(tensor: Tensor) -> list[int]:
    """All dimensions, largest stride first."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def walked(tensor: Tensor) -> list[int]:
    """The dimensions that a walk through memory takes steps along: those of more than one element."""
    return [dim for dim in memory_order(tensor) if tensor.shape[dim] != 1]


def layout_of(param: Tensor, grad: Tensor) -> Layout:
    """Merges every pair of dimensions that parameter and gradient both walk without a gap."""
    sizes: list[int] = []
    strides: list[tuple[int, int]] = []
    for dim in walked(param):
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
    for dim in reversed(walked(param)):
        if state.stride(dim) != expected:
            return False
        expected *= state.shape[dim]
    return True


def flat(plane: Tensor, param: Tensor, order: list[int] | None = None) -> Tensor:
    """A plane's memory with the dimensions in the order in which the parameter's lie, as a view.

    Planes of another shape (scales, packed codes) are in that order already. ``order`` is that of the
    parameter if it is known.
    """
    if param.ndim < 2 or plane.shape != param.shape:
        return plane
    return plane.permute(memory_order(param) if order is None else order)
