"""The products of Newton–Schulz, batched: ``X Xᵀ``, ``b A + c A²``, ``a A + A B`` and ``a X + B X``.

The first three compute one triangle and store each square twice: the result is symmetric to the bit. All
accumulate in fp32 and round once; fp32 goes through the tensor cores as three products of TF32 parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .product_shapes import (
    BAND,
    Shape,
    boxes,
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
    _symmetric(X, X, None, 1.0, 0.0, out)
    return out


def polynomial(A: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    """``b A + c A²`` of symmetric matrices [..., m, m], into ``out`` if given; no memory may be shared."""
    if out is None:
        out = torch.empty_like(A)
    _symmetric(A, A, A, c, b, out)
    return out


def multiply_commuting(A: Tensor, B: Tensor, a: float, out: Tensor | None = None) -> Tensor:
    """``a A + A B`` of symmetric [..., m, m] that commute, into ``out`` if given, apart from both."""
    if out is None:
        out = torch.empty_like(A)
    _symmetric(A, B, A, 1.0, a, out)
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


def _operands(tensors: Mapping[str, Tensor | None], shape: Shape, boxed: bool) -> tuple[Any, ...]:
    """Matrices as the kernels take them: descriptors of boxes, or addresses and strides."""
    sizes = boxes(shape)
    return tuple(
        None if x is None else _box(x, *sizes[name]) if boxed else (x, *x.stride())
        for name, x in tensors.items()
    )


def constants(shape: Shape, boxed: bool, bits: int) -> dict[str, Any]:
    """Compile-time arguments that both kernels have; ``bits`` of an element."""
    precision = "tf32x3" if bits == 32 else "tf32"
    return {"SIDE": shape.side, "DEPTH": shape.depth, "BAND": BAND, "BOXES": boxed, "PRECISION": precision}


def _launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], shape: Shape, flags: dict[str, Any], out: Tensor
) -> None:
    if out.device.type == "cpu":
        with np.errstate(all="ignore"):
            kernel[(programs,)](*arguments, **flags)
    else:
        with torch.cuda.device(out.device):
            options = {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}
            kernel[(programs,)](*arguments, **flags, **options)


def _check(out: Tensor, shape: torch.Size, *inputs: Tensor) -> None:
    assert out.shape == shape, (out.shape, shape)
    for x in inputs:
        assert (x.dtype, x.device) == (out.dtype, out.device), (x.dtype, x.device, out.dtype, out.device)
        assert x.data_ptr() != out.data_ptr() or out.numel() == 0, "a product cannot replace its operand"


def _symmetric(P: Tensor, Q: Tensor, D: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
    """``out = alpha P Qᵀ + beta D``, symmetric but for rounding."""
    from . import product_kernels

    _check(out, torch.Size((*P.shape[:-1], P.shape[-2])), P, Q)
    if out.numel() == 0:
        return
    p, q, d, y = _matrices(P), _matrices(Q), None if D is None else _matrices(D), _matrices(out)
    # These are symmetric: lay them out by rows, and both factors alike.
    d, y = d.mT if d is not None and _swapped(d) else d, y.mT if _swapped(y) else y
    q = q if _swapped(q) == _swapped(p) else q.mT
    (batches, m, k), bits = p.shape, 8 * p.itemsize
    capability, processors = _machine(out.device)
    shape = symmetric_shape(batches, m, bits, capability, processors)
    boxed = has_boxes(capability) and all(_is_boxed(t) for t in (p, q, d, y) if t is not None)
    flags = {**constants(shape, boxed, bits), "ADD": d is not None, "SWAPPED": boxed and _swapped(p)}
    operands = _operands({"p": p, "q": q, "r": q if boxed else None, "d": d, "out": y}, shape, boxed)
    arguments = (*operands, batches, m, k, alpha, beta)
    _launch(product_kernels.symmetric, batches * sum(triangle(m, shape.side)), arguments, shape, flags, out)


def _rectangular(X: Tensor, B: Tensor, a: float, out: Tensor) -> None:
    """``out = a X + B X``, or the transposed ``outᵀ = a Xᵀ + Xᵀ B`` if out lies by columns."""
    from . import product_kernels

    _check(out, X.shape, X, B)
    if out.numel() == 0:
        return
    x, b, y = map(_matrices, (X, B, out))
    b = b.mT if _swapped(b) else b
    p, q, d = b, x.mT, x
    if _swapped(y):
        p, q, d, y = x.mT, b, x.mT, y.mT
    (batches, m, n), bits = y.shape, 8 * y.itemsize
    capability, processors = _machine(out.device)
    shape = rectangular_shape(batches, m, n, bits, capability, processors)
    boxed = has_boxes(capability) and all(map(_is_boxed, (p, q, d, y)))
    flags = constants(shape, boxed, bits)
    for name, operand in (("P_SWAPPED", p), ("Q_SWAPPED", q), ("D_SWAPPED", d)):
        flags[name] = boxed and _swapped(operand)
    operands = _operands({"p": p, "q": q, "d": d, "out": y}, shape, boxed)
    arguments = (*operands, batches, m, n, p.shape[-1], 1.0, a)
    _launch(product_kernels.rectangular, batches * rectangle(m, n, shape.side), arguments, shape, flags, out)
