"""The symmetric products of Newton–Schulz, batched: ``X Xᵀ``, ``b A + c A²`` and ``a X + B X``.

The first two compute one triangle and store each square twice: the result is symmetric to the bit. All
accumulate in fp32 and round once; fp32 goes through the tensor cores as three products of TF32 parts.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .product_shapes import (
    BAND,
    Shape,
    has_boxes,
    rectangle,
    rectangular_shape,
    symmetric_shape,
    triangle,
)


def gram(X: Tensor, out: Tensor | None = None) -> Tensor:
    """``X Xᵀ`` of matrices [..., m, n], into ``out`` [..., m, m] if given; no memory may be shared."""
    if out is None:
        out = X.new_empty((*X.shape[:-1], X.shape[-2]))
    if X.shape[-1] == 0:
        return out.zero_()
    _symmetric(X, None, 1.0, 0.0, out)
    return out


def polynomial(A: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    """``b A + c A²`` of symmetric matrices [..., m, m], into ``out`` if given; no memory may be shared."""
    if out is None:
        out = torch.empty_like(A)
    _symmetric(A, A, c, b, out)
    return out


def multiply_add(X: Tensor, B: Tensor, a: float, out: Tensor | None = None) -> Tensor:
    """``a X + B X`` of X [..., m, n] and symmetric B [..., m, m], into ``out`` if given, apart from both."""
    if out is None:
        out = torch.empty_like(X)
    _rectangular(X, B, a, out)
    return out


@cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Compute capability and number of multiprocessors; for the interpreter those of an A100."""
    if device.type == "cpu":
        return 80, 108
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _matrices(x: Tensor) -> Tensor:
    """A view [batch, rows, columns]."""
    return x.view(math.prod(x.shape[:-2]), *x.shape[-2:])


def _swapped(x: Tensor) -> bool:
    """Whether columns, not rows, lie side by side in memory."""
    return x.stride(-2) == 1 and x.stride(-1) != 1


def _is_boxed(x: Tensor) -> bool:
    """Whether the bulk copy engine can fetch from it: rows that start on 16-byte boundaries."""
    x = x.mT if _swapped(x) else x
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * x.itemsize % 16 == 0 for stride in strides)
    return aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def _box(x: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if _swapped(x):
        x, rows, columns = x.mT, columns, rows
    # The stride of a dimension of one is arbitrary, and the engine wants all of them aligned.
    units = 16 // x.itemsize
    far = -(-x.numel() // units) * units
    strides = [stride if size > 1 else far for stride, size in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, rows, columns])


def _addresses(x: Tensor) -> Any:
    return (x, *x.stride())


def _constants(shape: Shape, boxes: bool, x: Tensor) -> dict[str, Any]:
    """Compile-time arguments and options that the kernels share."""
    constants = {"SIDE": shape.side, "DEPTH": shape.depth, "BAND": BAND, "BOXES": boxes}
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
    return constants | {"PRECISION": precision} | options


def _launch(kernel: Any, programs: int, arguments: Any, constants: dict[str, Any], out: Tensor) -> None:
    if out.device.type == "cpu":
        with np.errstate(all="ignore"):
            kernel[(programs,)](*arguments, **constants)
    else:
        with torch.cuda.device(out.device):
            kernel[(programs,)](*arguments, **constants)


def _check(out: Tensor, shape: torch.Size, *inputs: Tensor) -> None:
    assert out.shape == shape, (out.shape, shape)
    for x in inputs:
        assert (x.dtype, x.device) == (out.dtype, out.device), (x.dtype, x.device, out.dtype, out.device)
        assert x.data_ptr() != out.data_ptr() or out.numel() == 0, "a product cannot replace its operand"


def _symmetric(P: Tensor, D: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
    """``out = alpha P Pᵀ + beta D``."""
    from . import product_kernels

    _check(out, torch.Size((*P.shape[:-1], P.shape[-2])), P)
    if out.numel() == 0:
        return
    capability, processors = _machine(out.device)
    x, d, y = _matrices(P), None if D is None else _matrices(D), _matrices(out)
    batches, m, k = x.shape
    shape = symmetric_shape(batches, m, 8 * x.itemsize, capability, processors)
    # Both are symmetric: lay them out by rows.
    d, y = d.mT if d is not None and _swapped(d) else d, y.mT if _swapped(y) else y
    boxes = has_boxes(capability) and all(_is_boxed(t) for t in (x, d, y) if t is not None)
    side, depth = shape.side, shape.depth
    if boxes:
        add = None if d is None else _box(d, side, side)
        operands = (_box(x, side, depth), _box(x, 2 * side, depth), add, _box(y, side, side))
    else:
        operands = (_addresses(x), _addresses(x), None if d is None else _addresses(d), _addresses(y))
    constants = _constants(shape, boxes, x) | {"ADD": d is not None, "SWAPPED": boxes and _swapped(x)}
    programs = batches * sum(triangle(m, side))
    _launch(product_kernels.symmetric, programs, (*operands, batches, m, k, alpha, beta), constants, out)


def _rectangular(X: Tensor, B: Tensor, a: float, out: Tensor) -> None:
    """``out = a X + B X``, or the transposed ``outᵀ = a Xᵀ + Xᵀ B`` if out lies by columns."""
    from . import product_kernels

    _check(out, X.shape, X, B)
    if out.numel() == 0:
        return
    capability, processors = _machine(out.device)
    x, b, y = map(_matrices, (X, B, out))
    b = b.mT if _swapped(b) else b
    d, p, q = x, b, x.mT
    if _swapped(y):
        d, p, q, y = x.mT, x.mT, b, y.mT
    batches, m, n = y.shape
    shape = rectangular_shape(batches, m, n, 8 * x.itemsize, capability, processors)
    boxes = has_boxes(capability) and all(map(_is_boxed, (p, q, d, y)))
    side, depth = shape.side, shape.depth
    sizes = ((p, side, depth), (q, 2 * side, depth), (d, side, side), (y, side, side))
    operands = tuple(_box(*size) if boxes else _addresses(size[0]) for size in sizes)
    names = ("P_SWAPPED", "Q_SWAPPED", "D_SWAPPED")
    constants = _constants(shape, boxes, x)
    constants |= {name: boxes and _swapped(t) for name, t in zip(names, (p, q, d), strict=True)}
    programs = batches * rectangle(m, n, side)
    arguments = (*operands, batches, m, n, p.shape[-1], 1.0, a)
    _launch(product_kernels.rectangular, programs, arguments, constants, out)
